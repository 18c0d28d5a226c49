"""Random models in the real engine: every mode says the script, and drafts agree with it as often as asked."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest

from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.load import load_decoder
from ssd_runtime.speculation.types import Outcome, SamplingParams, Speculation
from tests.engines import in_process, request
from tests.tiny_models import CPU


@functools.cache
def model(agreement: str = "") -> Decoder:
    return load_decoder(f"random:tiny{agreement}", "fp32", CPU)


def run(
    mode: str,
    prompt: Sequence[int],
    temperature: float,
    agreement: str = "@0.85",
    tokens: int = 300,
    **speculation: Any,
) -> Any:
    """The output, hits, misses, and how many draft tokens were accepted and rejected."""
    engine = EngineConfig(max_model_len=512)
    config = SpeculationConfig(**({"lookahead": 5, "budget": 16} | speculation))
    process = in_process(model(), model(agreement), engine, config, steps=8)
    counted = [0, 0]
    observe = process.link.observe

    def counting(speculations: Sequence[Speculation], outcomes: Sequence[Outcome], seconds: float) -> None:
        for one, outcome in zip(speculations, outcomes, strict=True):
            counted[0] += outcome.num_accepted
            counted[1] += outcome.num_accepted < len(one.tokens)
        observe(speculations, outcomes, seconds)

    process.link.observe = counting  # type: ignore[method-assign]
    params = SamplingParams(temperature, seed=9)
    (sequence,) = process.run([request(tuple(prompt), mode, lookahead=5, max_tokens=tokens, params=params)])
    assert sequence.finish_reason == "length"
    return sequence.tokens[sequence.num_prompt :], sequence.measured, *counted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_mode_says_the_script_and_a_draft_is_right_as_often_as_asked(temperature: float) -> None:
    plain, *_ = run("ar", range(40), temperature)
    other, *_ = run("ar", range(100, 60, -1), 2.0)
    assert plain == other, "the text depends on the prompt or on noise"
    for mode in ("sd", "ssd"):
        tokens, measured, accepted, rejected = run(mode, range(40), temperature)
        assert tokens == plain
        # Of 300 positions 255 are the draft's; those that are not verified, as bonus tokens, are few and any.
        assert accepted / (accepted + rejected) == pytest.approx(0.85, abs=0.03)
        if mode == "ssd":
            hit_rate = measured.hits / (measured.hits + measured.misses)
            assert (0.85 if temperature == 0.0 else 0.6) < hit_rate < 0.98


def test_a_draft_that_never_agrees_is_never_accepted_and_one_that_always_does_always_is() -> None:
    plain, *_ = run("ar", range(40), 0.0, tokens=100)
    never, always = (run("ssd", range(40), 0.0, agreement, tokens=100) for agreement in ("@0", "@1"))
    assert never[0] == always[0] == plain
    assert never[2] == 0
    assert always[3] == 0


def test_under_rejection_sampling_the_share_is_the_same() -> None:
    _, _, accepted, rejected = run("sd", range(40), 1.0, coupling="rejection")
    assert accepted / (accepted + rejected) == pytest.approx(0.85, abs=0.03)
