"""Models of random weights: published shapes, the same weights again, made where they are used, printable text."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher import doctor, session
from ssd_runtime.comm.control.client_messages import Status
from ssd_runtime.config import load_config
from ssd_runtime.errors import ConfigError
from ssd_runtime.model.files.catalogue import resolve
from ssd_runtime.model.files.header import inspect_model
from ssd_runtime.model.files.source import WHOLE, expected_tensors
from ssd_runtime.model.load import load_decoder
from ssd_runtime.model.parallel import ShardPlan
from ssd_runtime.model.random.models import FIRST_WORD, PREFIX, SHAPES, label, pair_overrides, random_model
from ssd_runtime.model.random.weights import RandomWeights
from ssd_runtime.model.text.tokenizer import Tokenizer
from tests.live_bytes import peak_bytes
from tests.tiny_models import CPU, PagedRun

BILLIONS = {"llama-1b": 1.2358, "llama-8b": 8.0303, "llama-70b": 70.5537, "qwen-0.6b": 0.5960, "qwen-32b": 32.7621}
BILLIONS |= {"smollm2-135m": 0.134515}


def num_parameters(name: str) -> int:
    return sum(math.prod(shape) for shape in expected_tensors(SHAPES[name].arch).values())


@pytest.mark.parametrize("name", BILLIONS)
def test_a_shape_has_the_parameters_that_were_published(name: str) -> None:
    assert num_parameters(name) == pytest.approx(BILLIONS[name] * 1e9, rel=1e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_can_be_run_and_has_a_draft_of_its_vocabulary(name: str) -> None:
    shape = SHAPES[name]
    shape.arch.check(name, {})
    draft = SHAPES[shape.draft]
    assert draft.arch.vocab_size == shape.arch.vocab_size
    assert num_parameters(shape.draft) <= num_parameters(name)


def test_weights_are_the_same_again_and_those_of_a_rank_are_a_part_of_them() -> None:
    model = random_model("random:tiny")
    assert model is not None
    weights, again = RandomWeights(model), RandomWeights(model)
    seen = set()
    for name, shape in expected_tensors(model.arch).items():
        whole = weights.read(name)
        assert whole.shape == shape
        assert torch.equal(again.read(name), whole)
        for rank in range(2):
            part = ShardPlan(model.arch, rank, 2).part(name)
            found = weights.read(name, part)
            assert torch.equal(found, part.of(whole)), name
            assert part == WHOLE or found.untyped_storage().nbytes() == found.nbytes, "the whole stays alive"
        if whole.dim() == 2:
            assert whole.std().item() == pytest.approx(shape[1] ** -0.5, rel=0.05)
            seen.add(whole[0, 0].item())
    assert len(seen) == sum(len(shape) == 2 for shape in expected_tensors(model.arch).values()), "tensors repeat"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
def test_a_random_model_runs_in_every_dtype_with_logits_of_the_order_of_one(dtype: Any) -> None:
    logits_RV = PagedRun(load_decoder("random:tiny", dtype, CPU)).trunk(range(20))
    own = logits_RV[logits_RV < 50.0]  # not the script's
    assert torch.isfinite(logits_RV).all()
    assert 0.3 < own.std().item() < 3.0
    assert own.abs().max() < 10.0


@pytest.mark.parametrize("name", ["llama-8b", "qwen-32b", "llama-1b"])
def test_a_model_is_made_on_its_device_and_never_held_twice(name: str) -> None:
    peak = peak_bytes(lambda: load_decoder(PREFIX + name, "bf16", torch.device("meta")))
    largest = max(math.prod(shape) for shape in expected_tensors(SHAPES[name].arch).values())
    assert peak < max(1.05 * 2 * num_parameters(name), 2 * num_parameters(name) + 4 * largest)


def test_a_vocabulary_is_bytes_and_printable_words_and_nothing_in_it_ends_a_text() -> None:
    header, tokenizer = inspect_model("random:smollm2-135m"), Tokenizer.from_model("random:smollm2-135m")
    assert header.vocabulary.digest().size == header.arch.vocab_size
    assert header.eos_token_ids == ()
    words = [tokenizer.decode([token]) for token in range(FIRST_WORD, tokenizer.vocab_size)]
    assert all(word.isprintable() and word.strip() for word in words)
    assert len(set(words)) == len(words)


TINY = Tokenizer.from_model("random:tiny")


@given(st.text())
def test_any_text_can_be_asked_and_has_a_token_for_each_byte(text: str) -> None:
    assert TINY.decode(TINY.encode(text)) == text
    assert len(TINY.encode(text)) == len(text.encode())
    assert text in TINY.chat([{"role": "user", "content": text}])


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("random:lama-8b", "did you mean random:llama-8b"),
        ("random:", "known: llama-1b"),
        ("random:tiny@", "'' is not a number from 0 to 1"),
        ("random:tiny@nan", "'nan' is not a number"),
        ("random:tiny@1.01", "'1.01' is not a number"),
    ],
)
def test_a_name_that_is_none_says_what_to_write(path: str, says: str) -> None:
    for look in (resolve, inspect_model, Tokenizer.from_model):
        with pytest.raises(ConfigError, match=says):
            look(path)


def test_a_pair_is_named_by_its_target_and_labelled() -> None:
    assert pair_overrides("llama-70b", 0.7) == ("target.model=random:llama-70b", "draft.model=random:llama-1b@0.7")
    config = load_config(None, pair_overrides("llama-8b,llama-135m", 0.85))
    assert resolve(config.draft.model) == config.draft.model == "random:llama-135m@0.85"
    said = label(config.target.model, config.draft.model)
    assert said == "scripted text, random weights: target random:llama-8b, draft random:llama-135m@0.85"
    assert label("random:tiny", "elsewhere.gguf") == "scripted text, random weights: target random:tiny"
    assert label("elsewhere.gguf", "random:tiny") is None


def test_an_engine_that_runs_already_is_labelled_by_what_it_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Running:
        def __init__(self, address: str, timeout_s: float) -> None: ...

        def status(self) -> Status:
            return Status("ready", "linked", "random:tiny", "random:tiny@0.85", "ssd")

        def close(self) -> None: ...

    monkeypatch.setattr(session, "Client", Running)
    monkeypatch.setattr(session, "_knock", lambda address: None)
    with session.connected("127.0.0.1:9", 1.0) as found:
        assert found.label == "scripted text, random weights: target random:tiny, draft random:tiny@0.85"


def test_the_doctor_plans_a_model_that_has_no_file() -> None:
    found = {one.subject: one for one in doctor.examine(load_config(None, pair_overrides("smollm2-135m", 0.85)))}
    assert "random:smollm2-135m (random): 30 layers" in found["target model"].detail
    assert "0.30 GiB of weights" in found["target rank 0"].detail  # the tied head is packed apart
    assert found["vocabularies"].ok
