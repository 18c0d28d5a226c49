"""Scripted logits: so many first tokens of each hundred are the script's, whatever the noise and the slice."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssd_runtime.comm.collective import TargetGroup
from ssd_runtime.model.load import load_decoder
from ssd_runtime.model.random.models import FIRST_WORD
from ssd_runtime.model.random.script import CANDIDATES, EXPONENT, HUNDRED, PERIOD, SCALE, Script
from ssd_runtime.speculation.sampling.ranking import Choice, rank_tokens
from ssd_runtime.speculation.types import SamplingParams
from tests.target_ranks import on_every_rank
from tests.tiny_models import CPU, PagedRun

VOCAB = 512


@functools.cache
def script(agreement: float) -> Script:
    return Script(VOCAB, agreement, CPU)


def logits(agreement: float, positions: range, own_RV: Tensor | None = None) -> Tensor:
    own_RV = torch.zeros(len(positions), VOCAB) if own_RV is None else own_RV
    return script(agreement).write_(own_RV, torch.tensor(positions))


def text(positions: range) -> Tensor:
    """The script's tokens at these positions."""
    return logits(1.0, positions).argmax(1)


@pytest.mark.parametrize("agreement", [0.0, 0.6, 0.85, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_so_many_first_tokens_of_each_hundred_are_the_scripts(agreement: float, temperature: float) -> None:
    """Against own logits as large as random weights have them, under noise of any seed."""
    positions = range(3 * HUNDRED, 6 * HUNDRED)
    for seed in range(3):
        own_RV = 9.0 * (2.0 * torch.rand(len(positions), VOCAB, generator=torch.Generator().manual_seed(seed)) - 1.0)
        choices = [Choice(SamplingParams(temperature, seed=seed), position) for position in positions]
        rankings = rank_tokens(logits(agreement, positions, own_RV), choices, CANDIDATES)
        agrees = torch.tensor([ranking.tokens[0] for ranking in rankings]) == text(positions)
        assert agrees.view(-1, HUNDRED).sum(1).tolist() == [round(agreement * HUNDRED)] * 3
        assert all(min(ranking.tokens) >= FIRST_WORD for ranking in rankings)
        assert all(token in ranking.tokens for ranking, token in zip(rankings, text(positions).tolist(), strict=True))


def test_where_the_draft_errs_the_scripts_token_comes_later_by_the_power_law() -> None:
    positions = range(0, PERIOD, 10)
    rankings = logits(0.0, positions).topk(CANDIDATES).indices
    place = (rankings == text(positions)[:, None]).int().argmax(1)
    assert place.min() == 1, "it is first somewhere"
    for fan_out in (1, 2, 4, 8, 16):
        missed = (place > fan_out).double().mean().item()
        assert missed == pytest.approx(SCALE * fan_out**-EXPONENT, abs=0.015)


def test_the_text_repeats_behind_its_period_and_not_before() -> None:
    once, again = range(500), range(PERIOD, PERIOD + 500)
    assert torch.equal(logits(0.6, once), logits(0.6, again))
    assert len(set(text(once).tolist())) > 200


@given(st.integers(0, VOCAB - 1), st.integers(1, VOCAB), st.integers(0, 2 * PERIOD), st.sampled_from([0.0, 0.6, 1.0]))
def test_a_slice_gets_its_columns_of_the_whole(first: int, width: int, start: int, agreement: float) -> None:
    positions = range(start, start + 4)
    own_RV = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(start))
    whole_RV = logits(agreement, positions, own_RV.clone())
    stop = min(first + width, VOCAB)
    part_RL = script(agreement).write_(own_RV[:, first:stop].clone(), torch.tensor(positions), first)
    assert torch.equal(part_RL, whole_RV[:, first:stop])
    assert ((whole_RV != own_RV).sum(1) == CANDIDATES).all()


def test_what_is_no_number_stays_to_be_seen() -> None:
    own_RV = torch.full((2, VOCAB), float("nan"))
    assert logits(0.85, range(2), own_RV).isnan().all()


def test_it_is_written_without_reading_anything_back() -> None:
    meta = torch.device("meta")  # where every host read raises
    own_RV, positions_R = torch.empty(4, VOCAB, device=meta), torch.empty(4, dtype=torch.int64, device=meta)
    assert Script(VOCAB, 0.85, meta).write_(own_RV, positions_R) is own_RV


def test_ranks_that_share_a_model_say_what_it_says_alone() -> None:
    tokens = list(range(40))
    alone = PagedRun(load_decoder("random:tiny@0.6", "fp32", CPU)).trunk(tokens)

    def work(group: TargetGroup) -> Tensor:
        return PagedRun(load_decoder("random:tiny@0.6", "fp32", CPU, group=group)).trunk(tokens)

    for found in on_every_rank(2, work):
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=0)
        assert torch.equal(found.argmax(1), alone.argmax(1))
