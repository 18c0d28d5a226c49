"""Coupling "rejection" through the real engine: what must hold exactly, whatever the noise."""

from __future__ import annotations

import pytest
import torch

from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.speculation.types import SamplingParams
from tests.engines import in_process, random_steps, request
from tests.tiny_models import PagedRun, tiny_decoder

ENGINE = EngineConfig(max_model_len=96, max_num_seqs=4, block_size=4)
PROMPTS = ((3, 1, 4, 1, 5), (9, 2, 6), (5, 3, 5, 8, 9, 7, 9))


def run(coupling: str, temperature: float, modes: tuple[str, ...], draft_seed: int = 7, **speculation: object):
    config = SpeculationConfig(lookahead=3, coupling=coupling, **speculation)  # type: ignore[arg-type]
    process = in_process(tiny_decoder(seed=7), tiny_decoder(seed=draft_seed), ENGINE, config, random_steps(2, 5))
    params = SamplingParams(temperature=temperature, seed=11, top_k=20, top_p=0.95)
    asked = [
        request(prompt, mode, params=params, max_tokens=24, request_id=f"{mode} {prompt}")
        for prompt in PROMPTS
        for mode in modes
    ]
    sequences = process.run(asked)
    process.assert_all_blocks_are_back()
    return sequences


@pytest.mark.parametrize("speculation", [{}, {"top_m": 3, "saguaro_c": 0.3, "saguaro_f": 2}, {"top_m": 1}])
def test_at_temperature_0_every_mode_emits_the_tokens_of_shared_noise(speculation):
    modes = ("ar", "sd", "sd-colocated", "ssd")
    plain = [sequence.tokens for sequence in run("shared-noise", 0.0, ("ar",))]
    found = run("rejection", 0.0, modes, draft_seed=8, **speculation)
    assert [sequence.tokens for sequence in found] == [tokens for tokens in plain for _ in modes]


def test_a_draft_that_is_the_target_and_sends_all_it_samples_from_is_never_rejected():
    # top_k keeps 20 tokens, so 32 probabilities are the whole of q, and q is p.
    for sequence in run("rejection", 0.9, ("sd", "sd-colocated", "ssd")):
        measured = sequence.measured
        assert measured.drafted > 0
        assert measured.accepted == measured.drafted


def test_a_truncated_or_modified_draft_of_the_same_model_is_rejected_now_and_then():
    for speculation in ({"top_m": 2}, {"top_m": 1}, {"saguaro_c": 0.1, "saguaro_f": 2}):
        sequences = run("rejection", 0.9, ("sd", "ssd"), **speculation)
        accepted = sum(sequence.measured.accepted for sequence in sequences)
        assert 0 < accepted < sum(sequence.measured.drafted for sequence in sequences)


def test_sd_does_not_depend_on_what_shares_its_batch_and_ar_draws_other_tokens():
    """SD waits for whole speculations, so nothing depends on time: the text is a function of the seed."""
    alone = [sequence.tokens for sequence in run("rejection", 0.9, ("sd",), draft_seed=8)]
    for modes in (("sd", "ssd"), ("sd", "ar", "sd-colocated")):
        found = run("rejection", 0.9, modes, draft_seed=8)
        assert [sequence.tokens for sequence in found if sequence.request.mode == "sd"] == alone
    plain = [sequence.tokens for sequence in run("rejection", 0.9, ("ar",), draft_seed=8)]
    assert plain != alone
    assert [sequence.tokens for sequence in run("rejection", 0.9, ("ar", "ssd"))][0::2] == plain


@pytest.mark.parametrize("backup", ["ngram", "none", "draft"])
def test_every_token_is_one_that_the_processors_allow(backup):
    """With penalties that change from token to token, each emitted token is in the target's top 3 at its position."""
    target = tiny_decoder(seed=7)
    config = SpeculationConfig(lookahead=3, coupling="rejection", backup=backup)
    process = in_process(target, tiny_decoder(seed=8), ENGINE, config, random_steps(4, 5))
    params = SamplingParams(temperature=1.5, seed=3, top_k=3, frequency_penalty=1.5, logit_bias=((5, 4.0),))
    (ssd,) = process.run([request(PROMPTS[0], params=params, max_tokens=40)])
    output = ssd.tokens[len(PROMPTS[0]) :]
    for index, token in enumerate(output):
        logits_V = last_logits(target, [*PROMPTS[0], *output[:index]])
        counts_V = torch.bincount(torch.tensor(output[:index], dtype=torch.int64), minlength=len(logits_V))
        logits_V = logits_V - 1.5 * counts_V
        logits_V[5] += 4.0
        assert logits_V[token] >= logits_V.topk(3).values[-1] - 1e-4


def last_logits(decoder, tokens):
    return PagedRun(decoder).trunk(tokens)[-1]
