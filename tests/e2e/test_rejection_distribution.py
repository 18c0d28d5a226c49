"""Coupling "rejection" loses nothing: what the real engine emits has the model's own distribution.

A vocabulary of 4, so that every text can be enumerated; models that are tables and disagree a lot (a third of the
draft's tokens are rejected), served by the real engine, link speculator, drafter and frames, in requests of 30 tokens.
Two chi-square tests on the same tokens, each against exact chances:

    single   every token given the two before it, which are what the draft looks at: 16 contexts x 4 tokens, at most 48
             degrees of freedom
    joint    three successive tokens given the one before them: 4 contexts x 64 cells, some 50 degrees of freedom after
             pooling cells expected less than 5 times; a speculation has at most 2 tokens and a round emits at most 3,
             so most windows lie across two or three rounds

Given their contexts, the counts of a Markov chain are multinomial asymptotically (Billingsley 1961), so both are
chi-square. False alarms: each statistic is held against the 1e-4 quantile; 78 of them are judged, so that a correct
implementation would fail with one choice of seeds in 130. Each has seeds of its own: where most tokens are drawn by the
target alone, equal seeds would give nearly equal texts, and one unlucky set would be judged again and again.
Drafting steps and waits are fixed: a run that passed passes. Power: 1200 tokens and 400 windows a temperature find an
effect of w = .27 ("single") or .5 ("joint") in 99 cases of 100 (noncentrality n w^2 of 85 and 100); w^2 is the sum of
(p' - p)^2 / p, so w is about twice the total variation. The mutants below are such effects, and each has to be found in
2400 tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ssd_runtime.comm import frames
from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.speculation import backup, proposal, rejection, verify
from ssd_runtime.speculation.noise import Stream, extend_text, text_key, uniform_noise
from ssd_runtime.speculation.sampling import process_logits
from ssd_runtime.speculation.types import Outcome, Proposal, SamplingParams
from tests.engines import in_process, random_steps, request
from tests.tabular import TabularModel

VOCAB, WINDOW, WINDOWS = 4, 3, 10
PROMPT = (3, 1, 2)
CRITICAL_Z = 3.72  # of the standard normal, one-sided p = 1e-4


def table(seed: int, scale: float) -> Tensor:
    return scale * torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))


# The target looks at one token, so that contexts are few; the draft at two.
TARGET = TabularModel(table(1, 1.2)[:1].expand(VOCAB, VOCAB, VOCAB).contiguous())
DRAFT = TabularModel(table(34, 1.5))


@dataclasses.dataclass(frozen=True)
class Case:
    """How to speculate, how many drafting steps fit into a verification, and what must have happened.

    Attributes:
        hits: least and most share of rounds whose speculation came from the cache.
    """

    speculation: dict[str, object]
    steps: int | None = 2
    mode: str = "ssd"
    hits: tuple[float, float] = (0.0, 1.0)

    def run(self, label: str, temperatures: tuple[float, ...], requests: int) -> dict[float, list[list[int]]]:
        """The texts of `requests` requests a temperature, all temperatures in one batch; seeds differ by label."""
        basis = {"lookahead": 2, "budget": 3, "recycle": 0, "fan_out": "uniform", "backup": "none", "top_m": VOCAB}
        config = SpeculationConfig(**(basis | {"coupling": "rejection"} | self.speculation))  # type: ignore[arg-type]
        engine = EngineConfig(max_model_len=40, max_num_seqs=6, block_size=8)
        process = in_process(TARGET, DRAFT, engine, config, random_steps(1, 3) if self.steps is None else self.steps)  # type: ignore[arg-type]
        asked = [
            request(
                PROMPT,
                self.mode,
                lookahead=2,
                max_tokens=1 + WINDOW * WINDOWS,
                params=SamplingParams(
                    temperature=temperature, seed=zlib.crc32(f"{label} {temperature} {seed}".encode())
                ),
                request_id=f"{temperature} {seed}",
            )
            for seed in range(requests)
            for temperature in temperatures
        ]
        sequences = process.run(asked)  # type: ignore[arg-type]
        process.assert_all_blocks_are_back()
        rounds = sum(sequence.measured.rounds for sequence in sequences)
        hits = sum(sequence.measured.hits for sequence in sequences)
        assert self.hits[0] <= hits / rounds <= self.hits[1]
        texts: dict[float, list[list[int]]] = {temperature: [] for temperature in temperatures}
        for sequence in sequences:
            texts[sequence.request.params.temperature].append(sequence.tokens[len(PROMPT) :])
        return texts


CASES = {
    "hit": Case({"budget": 10}, steps=3, hits=(0.9, 1.0)),
    "miss": Case({"budget": 2}, steps=None, hits=(0.1, 0.7)),
    "draft": Case({"backup": "draft"}, steps=0, hits=(0.0, 0.05)),
    "ngram": Case({"backup": "ngram"}, steps=0, hits=(0.0, 0.05)),
    "none": Case({}, steps=0, hits=(0.0, 0.05)),
    "truncated q": Case({"top_m": 2, "backup": "draft"}),
    "saguaro": Case({"saguaro_c": 0.2, "saguaro_f": 2, "backup": "draft"}, hits=(0.3, 0.95)),
    "greedy draft": Case({"top_m": 1}),
    "confidence and bets": Case({"fan_out": "confidence", "recycle": 2, "budget": 2}, steps=None, hits=(0.1, 0.9)),
    "sd": Case({}, mode="sd"),
    "sd-colocated": Case({}, mode="sd-colocated"),
}


@pytest.fixture(autouse=True)
def _waits_do_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup.JustInTime, "enough", lambda _, lengths, most: lengths == most)


def law(context: int, length: int, temperature: float) -> Tensor:
    """The chances of `length` tokens given the `context` tokens before: [V ** context, V ** length]."""
    given = itertools.product(range(VOCAB), repeat=context)
    return torch.stack([TARGET.law((0, *before), length, temperature).flatten() for before in given])


def counted(texts: list[list[int]], context: int, length: int) -> Tensor:
    """How often `length` tokens followed `context` tokens, in windows side by side: [V ** context, V ** length]."""
    counts = torch.zeros([VOCAB] * (context + length), dtype=torch.float64)
    for text in texts:
        for start in range(1, len(text) - length + 1, length):
            if start >= context:
                counts[tuple(text[start - context : start + length])] += 1
    return counts.reshape(VOCAB**context, -1)


def chi_square_z(counts_CX: Tensor, chances_CX: Tensor) -> float:
    """Chi-square over all contexts as a standard normal (Wilson-Hilferty); cells expected less than 5 times pooled."""
    statistic, freedom = 0.0, 0
    for counts_X, chances_X in zip(counts_CX, chances_CX, strict=True):
        expected_X = chances_X * counts_X.sum()
        common_X = expected_X >= 5
        cells = [*zip(counts_X[common_X].tolist(), expected_X[common_X].tolist(), strict=True)]
        rest = (float(counts_X[~common_X].sum()), float(expected_X[~common_X].sum()))
        if rest[1] >= 5:
            cells.append(rest)
        elif len(cells) < 2:
            continue
        else:  # a cell expected once or twice would have a tail that no chi-square has
            cells[-1] = (cells[-1][0] + rest[0], cells[-1][1] + rest[1])
        statistic += sum((observed - expected) ** 2 / expected for observed, expected in cells)
        freedom += max(0, len(cells) - 1)
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


def judge(texts: list[list[int]], temperature: float) -> dict[str, float]:
    return {
        name: chi_square_z(counted(texts, context, length), law(context, length, temperature))
        for name, context, length in (("single", 2, 1), ("joint", 1, WINDOW))
    }


@pytest.mark.parametrize("name", CASES)
def test_a_mixed_batch_has_the_targets_distribution_at_each_temperature(name: str) -> None:
    for temperature, texts in CASES[name].run(f"mixed {name}", (0.3, 0.7, 1.0), requests=40).items():
        found = judge(texts, temperature)
        assert max(found.values()) < CRITICAL_Z, (temperature, found)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", ["draft", "miss"])
def test_a_batch_of_one_temperature_has_the_targets_distribution(name: str, temperature: float) -> None:
    (texts,) = CASES[name].run(name, (temperature,), requests=40).values()
    assert max(judge(texts, temperature).values()) < CRITICAL_Z


# ---- mutants: each is a mistake that somebody has made, and must be found --------------------------------------------


Verify = Callable[..., Outcome]


def verify_with(
    accepts: Callable[[Tensor, Tensor, int, int, int], bool],
    residual: Callable[[Tensor, Tensor, Proposal], Tensor] = lambda p_V, q_V, _: rejection.residual_oracle(p_V, q_V),
    q_of: Callable[[Proposal], Tensor] = lambda sent: rejection.dense(sent, VOCAB),
) -> Verify:
    """Verification with replaceable parts; with the right ones it is `verify_oracle`."""

    def verify_wrongly(z_LV, speculation, seed, text):
        for k, (token, sent) in enumerate(zip(speculation.tokens, speculation.proposals, strict=True)):
            p_V, q_V = torch.softmax(z_LV[k].double(), dim=0), q_of(sent)
            if not accepts(p_V, q_V, token, seed, text):
                return Outcome(k, rejection.draw_oracle(residual(p_V, q_V, sent), choice(seed, text)))
            text = extend_text(text, (token,))
        p_V = torch.softmax(z_LV[-1].double(), dim=0)
        return Outcome(len(speculation.tokens), rejection.draw_oracle(p_V, choice(seed, text)))

    return verify_wrongly


def choice(seed: int, text: int) -> int:
    return text_key(seed, text, Stream.CHOICE)


def by_ratio(p_V: Tensor, q_V: Tensor, token: int, seed: int, text: int) -> bool:
    return uniform_noise(text_key(seed, text, Stream.ACCEPTANCE)) * float(q_V[token]) < float(p_V[token])


def by_equality(p_V: Tensor, q_V: Tensor, token: int, seed: int, text: int) -> bool:
    return token == rejection.draw_oracle(p_V, text_key(seed, text, Stream.ACCEPTANCE))


def unmodified_residual(p_V: Tensor, q_V: Tensor, sent: Proposal) -> Tensor:
    """The scaled tokens are the first two."""
    weights = tuple(weight / 0.2 if rank < 2 else weight for rank, weight in enumerate(sent.weights))
    return rejection.residual_oracle(p_V, rejection.dense(Proposal(sent.tokens, weights), VOCAB))


def as_sent(sent: Proposal) -> Tensor:
    q_V = torch.zeros(VOCAB, dtype=torch.float64)
    q_V[list(sent.tokens)] = torch.tensor(sent.weights, dtype=torch.float64)
    return q_V


def not_renormalised(logits_RV, draws, texts, count, rule):
    """Sample from the truncated q, send what these tokens had before it was truncated."""
    rankings = []
    found = proposal.propose_tokens(logits_RV, draws, texts, count, rule)
    for logits_V, draw, ranking in zip(logits_RV, draws, found, strict=True):
        whole_V = torch.softmax(process_logits(logits_V, draw.params), dim=0)
        weights = tuple(whole_V[list(ranking.proposal.tokens)].tolist())
        rankings.append(dataclasses.replace(ranking, proposal=Proposal(ranking.proposal.tokens, weights)))
    return rankings


def patch_keys(monkeypatch: pytest.MonkeyPatch, key: Callable[[int, int, Stream], int]) -> None:
    for module in (proposal, rejection):
        monkeypatch.setattr(module, "text_key", key)


def token_equality(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "verify_by_rejection", verify_with(by_equality))


def residual_of_the_unmodified_q(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "verify_by_rejection", verify_with(by_ratio, unmodified_residual))


def missing_renormalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssd_runtime.draft import drafter

    monkeypatch.setattr(frames, "SUM_TOLERANCE", 1.0)  # or the frame would be refused
    monkeypatch.setattr(drafter, "propose_tokens", not_renormalised)
    monkeypatch.setattr(verify, "verify_by_rejection", verify_with(by_ratio, q_of=as_sent))


def one_noise_for_all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_keys(monkeypatch, lambda seed, text, stream: text_key(seed, 0, stream))


def one_noise_for_all_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_keys(monkeypatch, lambda seed, text, stream: text_key(seed, text, Stream.CHOICE))


MUTANTS = {
    token_equality: "draft",
    residual_of_the_unmodified_q: "saguaro",
    missing_renormalisation: "truncated q",
    one_noise_for_all_positions: "draft",
    one_noise_for_all_streams: "draft",
}


@pytest.mark.parametrize(("mutate", "name"), [pytest.param(*item, id=item[0].__name__) for item in MUTANTS.items()])
def test_mutants_are_found(mutate: Callable[[pytest.MonkeyPatch], None], name: str, monkeypatch) -> None:
    mutate(monkeypatch)
    (texts,) = CASES[name].run("mutants", (1.0,), requests=80).values()
    assert max(judge(texts, 1.0).values()) > CRITICAL_Z


def test_the_mutants_without_their_mistake_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "verify_by_rejection", verify_with(by_ratio))
    (texts,) = CASES["saguaro"].run("mutants", (1.0,), requests=80).values()
    assert max(judge(texts, 1.0).values()) < CRITICAL_Z
