"""The embedded model against transformers: greedy text in fp32, agreement of bf16 and int8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from ssd_runtime.config import Dtype
from ssd_runtime.model.files.header import inspect_model
from ssd_runtime.model.load import load_decoder
from ssd_runtime.model.text.tokenizer import Tokenizer
from tests.tiny_models import CPU, PagedRun

pytestmark = pytest.mark.model
QUESTION = [{"role": "user", "content": "Why is the sky blue? Answer in two sentences."}]
PUBLISHED_CONFIG: dict[str, Any] = {  # of SmolLM2-135M-Instruct
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
}
DTYPES: tuple[Dtype, ...] = ("bf16", "int8", "int4")
PROMPTS = (
    "Write a Python function that reverses a list.",
    "Tell me a story about a fox.",
    "List five uses of a brick.",
    "What is the capital of Peru and what is it known for?",
)


def greedy(run: PagedRun, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    logits = run.trunk(prompt, logit_rows=[len(prompt) - 1])
    for _ in range(count):
        tokens.append(int(logits[-1].argmax()))
        logits = run.trunk(tokens[-1:], len(tokens) - 1)
    return tokens[len(prompt) :]


def reference_model(path: str) -> transformers.LlamaForCausalLM:
    """The file as transformers itself reads it (`from_pretrained(gguf_file=...)` would ask for accelerate too)."""
    config = transformers.LlamaConfig(**PUBLISHED_CONFIG)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=empty)["tensors"]
    model = transformers.LlamaForCausalLM(config).eval()
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"])  # tied
    return model


def test_greedy_text_in_fp32_is_transformers_own(smollm2_path: str) -> None:
    tokenizer = Tokenizer.from_model(smollm2_path)
    prompt = tokenizer.encode(tokenizer.chat(QUESTION), add_special=False)
    answer = greedy(PagedRun(load_decoder(smollm2_path, "fp32", CPU)), prompt, 32)
    with torch.inference_mode():  # one forward: if each token is the best after those before, the text is greedy
        logits = reference_model(smollm2_path)(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    assert answer == logits.argmax(-1).tolist()
    assert "scatter" in tokenizer.decode(answer)


def test_a_quantized_draft_mostly_chooses_the_token_of_bf16_in_its_own_text(smollm2_path: str) -> None:
    """What a greedy draft's acceptance will be: bf16 writes, int8 and int4 are asked at every position."""
    tokenizer = Tokenizer.from_model(smollm2_path)
    decoders = {dtype: load_decoder(smollm2_path, dtype, CPU) for dtype in DTYPES}
    agreed: dict[str, list[bool]] = {dtype: [] for dtype in DTYPES}
    for prompt in PROMPTS:
        ids = tokenizer.encode(tokenizer.chat([{"role": "user", "content": prompt}]), add_special=False)
        answer = greedy(PagedRun(decoders["bf16"]), ids, 48)
        for dtype in DTYPES:
            logits = PagedRun(decoders[dtype]).trunk(ids + answer)[len(ids) - 1 : -1]
            agreed[dtype] += (logits.argmax(-1) == torch.tensor(answer)).tolist()
    shares = {dtype: sum(found) / len(found) for dtype, found in agreed.items()}
    print(f"agreement with bf16's greedy text over {len(agreed['int8'])} tokens: {shares}")  # noqa: T201
    assert shares["int8"] > 0.88
    assert shares["int4"] > 0.92  # the file has 4-bit weights: int4 keeps them as they are
    assert shares["bf16"] > 0.95  # prefill and decode round differently


def test_inspection_reads_headers_only(smollm2_path: str) -> None:
    header = inspect_model(smollm2_path)
    assert (header.format, header.arch.num_layers, header.arch.num_kv_heads) == ("gguf", 30, 3)
    assert header.arch.tie_word_embeddings
    assert header.eos_token_ids == (2,)
    assert len(header.vocabulary.tokens) == header.arch.vocab_size == 49152


def test_progress_climbs_from_zero_to_one(smollm2_path: str) -> None:
    parts: list[float] = []
    load_decoder(smollm2_path, "bf16", CPU, parts.append)
    assert parts[0] == 0.0
    assert parts[-1] == 1.0
    assert parts == sorted(parts)
