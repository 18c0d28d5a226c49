"""The decoder's logits against transformers', on tiny random models of each family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from cuda_ext.ops import Span
from ssd_runtime.model.batch import ForwardBatch
from ssd_runtime.model.files.header import open_weights
from ssd_runtime.model.load import decoder_from_weights, load_decoder
from tests.tiny_models import CPU, PagedRun, RandomWeights, random_weight, tiny_architecture, tiny_decoder, write_gguf

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-no-groups": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}),
    "llama-everything": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "rope_parameters": LLAMA3_ROPE},
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-everything": (
        "Qwen3",
        {"attention_bias": True, "head_dim": 16, "use_sliding_window": True, "sliding_window": 40, "rope_theta": 500.0},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 8}),
}
TOKENS = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(7)).tolist()


def save_random(directory: Path, family: str, **save_options: Any) -> torch.nn.Module:
    """Write a random model of the family as transformers does; returns it."""
    name, changes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**copy.deepcopy(SIZES | changes))
    model: torch.nn.Module = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(random_weight(parameter_name, parameter.shape, generator))
    model.save_pretrained(directory, **save_options)  # type: ignore[operator]
    return model


@torch.inference_mode()
def reference_logits(model: torch.nn.Module, tokens: list[int] = TOKENS) -> Tensor:
    logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_in_one_piece_in_chunks_and_token_by_token(tmp_path: Path, family: str) -> None:
    expected = reference_logits(save_random(tmp_path, family))
    decoder = load_decoder(str(tmp_path), "fp32", CPU)
    assert expected.abs().max() > 1  # random weights that say something

    torch.testing.assert_close(PagedRun(decoder).trunk(TOKENS), expected, atol=1e-4, rtol=0)

    run, pieces = PagedRun(decoder, seed=1), []
    for start, end in ((0, 7), (7, 8), (8, 31), *((i, i + 1) for i in range(31, 40))):
        pieces.append(run.trunk(TOKENS[start:end], start))
    torch.testing.assert_close(torch.cat(pieces), expected, atol=1e-4, rtol=0)


def test_sharded_weights_are_found(tmp_path: Path) -> None:
    expected = reference_logits(save_random(tmp_path, "llama", max_shard_size="20KB"))
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    decoder = load_decoder(str(tmp_path), "fp32", CPU)
    torch.testing.assert_close(PagedRun(decoder).trunk(TOKENS), expected, atol=1e-4, rtol=0)


def test_only_wanted_rows_get_logits() -> None:
    decoder = tiny_decoder()
    everything = PagedRun(decoder).trunk(TOKENS)
    torch.testing.assert_close(PagedRun(decoder).trunk(TOKENS, logit_rows=[5, 39, 5]), everything[[5, 39, 5]])
    run = PagedRun(decoder)
    assert run.trunk(TOKENS[:20], logit_rows=[]).shape == (0, 96)
    torch.testing.assert_close(run.trunk(TOKENS[20:], 20), everything[20:], atol=1e-5, rtol=0)


def test_sequences_of_a_batch_give_what_they_give_alone() -> None:
    decoder = tiny_decoder(seed=1)
    texts = [TOKENS[:9], TOKENS[9:25], TOKENS[25:26]]
    kv = decoder.new_kv(100).fill_(float("nan"))
    tables = torch.randperm(100, generator=torch.Generator().manual_seed(2))[: 3 * 20].view(3, 20)
    sequence = torch.tensor([s for s, text in enumerate(texts) for _ in text])
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    batch = ForwardBatch(
        tokens_N=torch.tensor([token for text in texts for token in text]),
        positions_N=positions,
        slots_N=tables[sequence, positions],
        sequence_N=sequence,
        tables_SC=tables,
        prefix_N=positions + 1,
        chain_ND=torch.empty(len(positions), 0, dtype=torch.int64),
        spans=tuple(Span(len(text), len(text)) for text in texts),
    )
    together = decoder.forward(batch, kv)
    alone = torch.cat([PagedRun(decoder).trunk(text) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_tree_rows_give_what_each_branch_gives_alone() -> None:
    """Two levels over a trunk of 10: roots a, b at position 10; a has children c, d and b has e at position 11."""
    decoder = tiny_decoder(seed=2)
    run = PagedRun(decoder)
    run.trunk(TOKENS[:10], logit_rows=[])
    scratch = run.slots[-8:]
    parents, tokens = [-1, -1, 0, 0, 1], [3, 50, 17, 3, 80]
    chains = [([scratch[p].item()] if p >= 0 else [-1]) + [scratch[i].item()] for i, p in enumerate(parents)]
    depth = torch.tensor([0, 0, 1, 1, 1])

    def level(rows: list[int]) -> Tensor:
        count = len(rows)
        return decoder.forward(
            ForwardBatch(
                tokens_N=torch.tensor([tokens[i] for i in rows]),
                positions_N=10 + depth[rows],
                slots_N=scratch[rows],
                sequence_N=torch.zeros(count, dtype=torch.int64),
                tables_SC=run.slots[None],
                prefix_N=torch.full((count,), 10),
                chain_ND=torch.tensor([chains[i] for i in rows]),
                spans=(Span(count, 10),),
            ),
            run.kv,
        )

    logits = torch.cat((level([0, 1]), level([2, 3, 4])))
    for row, parent in enumerate(parents):
        branch = TOKENS[:10] + ([tokens[parent]] if parent >= 0 else []) + [tokens[row]]
        torch.testing.assert_close(logits[row], PagedRun(decoder).trunk(branch)[-1], atol=1e-5, rtol=0)
    in_one_forward = level([0, 1, 2, 3, 4])
    torch.testing.assert_close(in_one_forward, logits, atol=1e-5, rtol=0)


def test_bf16_and_int8_stay_close_to_fp32() -> None:
    shape = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    exact = PagedRun(tiny_decoder(seed=4, **shape)).trunk(TOKENS)
    for dtype, most in (("bf16", 0.03), ("int8", 0.06)):
        run = PagedRun(tiny_decoder(seed=4, dtype=dtype, **shape))  # type: ignore[arg-type]
        logits = run.trunk(TOKENS)
        assert run.kv.dtype == torch.bfloat16
        assert logits.dtype == torch.float32
        error = ((logits - exact).norm() / exact.norm()).item()
        assert error < most, f"{dtype}: relative error {error:.3f}"


@pytest.mark.parametrize(
    "changes",
    [{}, {"qkv_bias": True}, {"qk_norm": True}, {"num_kv_heads": 1}, {"attention_out_bias": True, "mlp_bias": True}],
)
def test_smoothing_keeps_the_function_and_makes_int8_more_exact(changes: dict[str, Any]) -> None:
    source = RandomWeights(tiny_architecture(hidden_size=64, intermediate_size=128, head_dim=16, **changes), seed=5)
    for index in range(2):  # a few loud features, as trained models have
        source.read(f"layers.{index}.input_layernorm.weight")[3] *= 30
        source.read(f"layers.{index}.post_attention_layernorm.weight")[9] *= 30
    exact = PagedRun(decoder_from_weights(source, "fp32", CPU)).trunk(TOKENS)

    smoothed = PagedRun(decoder_from_weights(source, "fp32", CPU, calibration=TOKENS[:20])).trunk(TOKENS)
    torch.testing.assert_close(smoothed, exact, atol=1e-3, rtol=1e-3)

    errors = [
        (PagedRun(decoder_from_weights(source, "int8", CPU, calibration=text)).trunk(TOKENS) - exact).norm()
        for text in (None, TOKENS[:20])
    ]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(
    "family",
    ["llama", "llama-tied", "llama3", "llama-everything", "linear-rope", "qwen2", "qwen3", "qwen3-everything"],
)
def test_gguf_gives_the_same_logits_as_the_directory_it_came_from(tmp_path: Path, family: str) -> None:
    expected = reference_logits(save_random(tmp_path / "hf", family))
    source = open_weights(str(tmp_path / "hf"))
    path = convert_to_gguf(tmp_path / "model.gguf", source)
    decoder = load_decoder(path, "fp32", CPU)
    torch.testing.assert_close(PagedRun(decoder).trunk(TOKENS), expected, atol=1e-4, rtol=0)


def convert_to_gguf(path: Path, source: Any, scaling: dict[str, Any] | None = None) -> str:
    """What llama.cpp's convert_hf_to_gguf.py does to the tensors, written out independently of the reader.

    Args:
        scaling: keys that say how rotary frequencies are scaled, in place of a tensor that does.
    """
    from ssd_runtime.model.decoder import rope_frequencies
    from ssd_runtime.model.files.source import expected_tensors

    arch = source.architecture
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "o_proj": "attn_output",
        "embed_tokens": "token_embd",
        "lm_head": "output",
        "norm": "output_norm",
    }
    names |= {f"{x}_proj": f"attn_{x}" for x in "qkv"} | {f"{x}_norm": f"attn_{x}_norm" for x in "qk"}
    names |= {f"{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    tensors = {}
    for name in expected_tensors(arch):
        *where, kind, suffix = name.split(".")
        tensor = source.read(name)
        if arch.family == "llama" and kind in ("q_proj", "k_proj"):
            heads = arch.num_heads if kind == "q_proj" else arch.num_kv_heads
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        layer = f"blk.{where[1]}." if where else ""
        tensors[f"{layer}{names[kind]}.{suffix}"] = tensor.float().numpy()
    if arch.rope_scaling is not None and scaling is None:
        plain = rope_frequencies(arch.head_dim, arch.rope_theta, None)
        scaled = rope_frequencies(arch.head_dim, arch.rope_theta, arch.rope_scaling)
        tensors["rope_freqs.weight"] = (plain / scaled).numpy()
    return write_gguf(path, arch, tensors, scaling)


def test_architecture_says_which_lengths_it_can_see() -> None:
    from ssd_runtime.errors import ConfigError

    arch = tiny_architecture(max_position=64, sliding_window=32)
    arch.check_length(32, "model m")
    with pytest.raises(ConfigError, match="sliding window of 32"):
        arch.check_length(33, "model m")
    with pytest.raises(ConfigError, match=r"made for 64 tokens.*max_model_len"):
        arch.check_length(65, "model m")
