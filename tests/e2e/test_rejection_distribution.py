"""Coupling "rejection" loses nothing: what the real engine emits has the model's own distribution.

Vocabularies of 4 to 8, so that every text can be enumerated; models that are tables and disagree a lot, served by the
real engine, link speculator, drafter and frames. One run a row: 24 requests of 151 tokens at temperatures .3, .7 and 1,
and greedy ones, all in one batch. Two chi-square tests a temperature on the same tokens, each against exact chances:

    single   every token given the two before it, which are what the draft looks at
    joint    three successive tokens given the one before them; a speculation has at most 2 tokens and a round emits at
             most 3, so most windows lie across two or three rounds

and "mixed": the statistics of the three temperatures added up, and the greedy rows, token by token. Given their
contexts, the counts of a Markov chain are multinomial asymptotically (Billingsley 1961), so all of them are chi-square.
Each is held against the 1e-4 quantile. Drafting steps and waits are fixed: a run that passed passes.

What the tests can see: test_rejection_mutants.py.
"""

from __future__ import annotations

import functools

import pytest

from ssd_runtime.leader import link_speculator
from tests.enumeration import CRITICAL_Z
from tests.tabular_runs import GREEDY, TEMPERATURES, TOKENS, Case, Texts

ROWS = {
    "hit": Case(4, {"budget": 10}, steps=3, hits=(0.9, 1.0)),
    "miss": Case(6, {"budget": 2}, steps=None, hits=(0.1, 0.7)),
    "draft": Case(5, {"backup": "draft"}, steps=0, hits=(0.0, 0.05)),
    "ngram": Case(7, {"backup": "ngram"}, steps=0, hits=(0.0, 0.05)),
    "none": Case(8, steps=0, hits=(0.0, 0.05)),
    "truncated q": Case(8, {"top_m": 2, "backup": "draft"}, hits=(0.1, 0.9)),
    "saguaro": Case(5, {"saguaro_c": 0.1, "saguaro_f": 2, "backup": "draft"}, hits=(0.2, 0.95)),
    "greedy draft": Case(4, {"top_m": 1}),
    "confidence and bets": Case(6, {"fan_out": "confidence", "recycle": 2}, steps=None, hits=(0.1, 0.9)),
    "two drafts": Case(7, {"budget": 2, "backup": "draft"}, steps=None, num_drafts=2),
    "sd": Case(5, mode="sd"),
    "sd-colocated": Case(8, mode="sd-colocated"),
}


@pytest.fixture(autouse=True)
def _waits_do_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_speculator, "drafted_enough", lambda _, lengths, most: lengths == most)


@functools.cache
def emitted(row: str) -> Texts:
    return ROWS[row].run(row, (*TEMPERATURES, GREEDY))


@pytest.mark.parametrize("temperature", [*TEMPERATURES, "mixed"])
@pytest.mark.parametrize("row", ROWS)
def test_what_is_emitted_has_the_targets_distribution(row: str, temperature: float | str) -> None:
    texts = emitted(row)
    found = ROWS[row].judge(texts)
    if temperature == "mixed":
        for test in ("single", "joint"):
            first, second, third = (found[one][test] for one in TEMPERATURES)
            assert (first + second + third).z < CRITICAL_Z
        for text in texts[GREEDY]:
            assert text == ROWS[row].greedy_text(TOKENS)
    else:
        assert max(one.z for one in found[temperature].values()) < CRITICAL_Z, found
