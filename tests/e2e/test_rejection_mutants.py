"""What the tests of test_rejection_distribution.py can see: mistakes that somebody has made, put into the engine.

Each of the first three has to be found at each temperature, by the samples that the right rule is judged by: 8 requests
of 151 tokens. The power is computed, not hoped for. With every speculation awaited a round has always two draft tokens,
and what a mistaken rule emits is a Markov chain that can be enumerated (`Rounds`); the statistic is then noncentral
chi-square, with the noncentrality n w^2 less what pooling takes (w^2 is the sum of (p' - p)^2 / p, so w is about twice
the total variation). Of "single", n = 1192, and the least favourable temperature, .3 everywhere:

    token_equality                w = .43, 45 degrees of freedom, noncentrality 188: power above .9999
    residual_of_the_unmodified_q  w = .31, 52 degrees of freedom, noncentrality 107: power .998
    missing_renormalisation       w = .32, 65 degrees of freedom, noncentrality 118: power .999

One noise for several draws makes what is emitted depend on more than two tokens (for all positions: a request repeats
itself), which is no such chain; these two have to be found by the three temperatures together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import reduce
from operator import add

import pytest
import torch
from torch import Tensor

from ssd_runtime.comm.link import frames
from ssd_runtime.draft import drafter
from ssd_runtime.leader import link_speculator
from ssd_runtime.speculation import verify
from ssd_runtime.speculation.noise import Stream, extend_text, text_key, uniform_noise
from ssd_runtime.speculation.rejection import acceptance, proposal
from ssd_runtime.speculation.rejection.saguaro import saguaro_logits
from ssd_runtime.speculation.sampling.ranking import process_logits
from ssd_runtime.speculation.types import Outcome, Proposal
from tests.e2e.test_rejection_distribution import ROWS
from tests.enumeration import CRITICAL_Z, ChiSquare, Rounds, Rule, joint_law, next_tokens, verification
from tests.tabular_runs import LOOKAHEAD, REQUESTS, TEMPERATURES, TOKENS, WINDOW, Case, models

Patch = pytest.MonkeyPatch
Mutate = Callable[[Patch], None]
Verify = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _waits_do_not_depend_on_the_clock(monkeypatch: Patch) -> None:
    monkeypatch.setattr(link_speculator, "drafted_enough", lambda _, lengths, most: lengths == most)


# ---- the mistakes, in the engine -------------------------------------------------------------------------------------


def verify_with(
    accepts: Callable[[Tensor, Tensor, int, int, int], bool],
    residual: Callable[[Tensor, Tensor, Proposal], Tensor] = lambda p_V, q_V, _: acceptance.residual_oracle(p_V, q_V),
    q_of: Callable[[Proposal, int], Tensor] = acceptance.dense,
) -> Verify:
    """Verification with replaceable parts; with the right ones it is `verify_oracle`."""

    def verify_wrongly(z_LV, speculation, seed, text):
        for k, (token, sent) in enumerate(zip(speculation.tokens, speculation.proposals, strict=True)):
            p_V, q_V = torch.softmax(z_LV[k].double(), dim=0), q_of(sent, len(z_LV[k]))
            if not accepts(p_V, q_V, token, seed, text):
                return Outcome(k, acceptance.draw_oracle(residual(p_V, q_V, sent), choice(seed, text)))
            text = extend_text(text, (token,))
        p_V = torch.softmax(z_LV[-1].double(), dim=0)
        return Outcome(len(speculation.tokens), acceptance.draw_oracle(p_V, choice(seed, text)))

    return verify_wrongly


def choice(seed: int, text: int) -> int:
    return text_key(seed, text, Stream.CHOICE)


def by_ratio(p_V: Tensor, q_V: Tensor, token: int, seed: int, text: int) -> bool:
    return uniform_noise(text_key(seed, text, Stream.ACCEPTANCE)) * float(q_V[token]) < float(p_V[token])


def by_equality(p_V: Tensor, q_V: Tensor, token: int, seed: int, text: int) -> bool:
    return token == acceptance.draw_oracle(p_V, text_key(seed, text, Stream.ACCEPTANCE))


def unmodified_residual(p_V: Tensor, q_V: Tensor, sent: Proposal) -> Tensor:
    """The scaled tokens are the first two."""
    weights = tuple(weight / 0.1 if rank < 2 else weight for rank, weight in enumerate(sent.weights))
    return acceptance.residual_oracle(p_V, acceptance.dense(Proposal(sent.tokens, weights), len(p_V)))


def as_sent(sent: Proposal, vocab_size: int) -> Tensor:
    q_V = torch.zeros(vocab_size, dtype=torch.float64)
    q_V[list(sent.tokens)] = torch.tensor(sent.weights, dtype=torch.float64)
    return q_V


def not_renormalised(logits_RV, choices, count, rule):
    """Sample from the truncated q, send what these tokens had before it was truncated."""
    rankings = []
    found = proposal.propose_tokens(logits_RV, choices, count, rule)
    for logits_V, choice, ranking in zip(logits_RV, choices, found, strict=True):
        whole_V = torch.softmax(process_logits(logits_V, choice.params), dim=0)
        weights = tuple(whole_V[list(ranking.proposal.tokens)].tolist())
        rankings.append(dataclasses.replace(ranking, proposal=Proposal(ranking.proposal.tokens, weights)))
    return rankings


def patch_keys(monkeypatch: Patch, key: Callable[[int, int, Stream], int]) -> None:
    for module in (proposal, acceptance):
        monkeypatch.setattr(module, "text_key", key)


def token_equality(monkeypatch: Patch) -> None:
    monkeypatch.setattr(verify, "verify_by_rejection", verify_with(by_equality))


def residual_of_the_unmodified_q(monkeypatch: Patch) -> None:
    monkeypatch.setattr(verify, "verify_by_rejection", verify_with(by_ratio, unmodified_residual))


def missing_renormalisation(monkeypatch: Patch) -> None:
    monkeypatch.setattr(frames, "SUM_TOLERANCE", 1.0)  # or the frame would be refused
    monkeypatch.setattr(drafter, "propose_tokens", not_renormalised)
    monkeypatch.setattr(verify, "verify_by_rejection", verify_with(by_ratio, q_of=as_sent))


def one_noise_for_all_positions(monkeypatch: Patch) -> None:
    patch_keys(monkeypatch, lambda seed, text, stream: text_key(seed, 0, stream))


def one_noise_for_all_streams(monkeypatch: Patch) -> None:
    patch_keys(monkeypatch, lambda seed, text, stream: text_key(seed, text, Stream.CHOICE))


MUTANTS = {
    token_equality: "draft",
    residual_of_the_unmodified_q: "saguaro",
    missing_renormalisation: "truncated q",
    one_noise_for_all_positions: "hit",
    one_noise_for_all_streams: "hit",
}


# w of "single" at temperatures .3, .7 and 1.
ENUMERATED: dict[Mutate, tuple[float, float, float]] = {
    token_equality: (0.43, 0.69, 0.78),
    residual_of_the_unmodified_q: (0.31, 0.46, 0.50),
    missing_renormalisation: (0.32, 0.53, 0.64),
}


def awaited(row: str) -> Case:
    """A row of the tests, with every speculation drafted to its end: what it emits can then be enumerated."""
    speculation = {**ROWS[row].speculation, "backup": "draft"}
    return dataclasses.replace(ROWS[row], speculation=speculation, steps=0, hits=(0.0, 0.05))


EVERY = pytest.mark.parametrize(
    ("mutate", "row"), [pytest.param(*item, id=item[0].__name__) for item in MUTANTS.items()]
)


@EVERY
def test_mutants_are_found(mutate: Mutate, row: str, monkeypatch: Patch) -> None:
    mutate(monkeypatch)
    case = awaited(row)
    found = case.judge(case.run("mutants"))
    if mutate in ENUMERATED:
        for one in found.values():
            assert one["single"].z > CRITICAL_Z, found
    else:
        assert reduce(add, (one["single"] for one in found.values())).z > CRITICAL_Z, found


def test_the_mutants_without_their_mistake_pass(monkeypatch: Patch) -> None:
    monkeypatch.setattr(verify, "verify_by_rejection", verify_with(by_ratio))
    case = awaited("saguaro")
    found = case.judge(case.run("mutants"))
    assert max(one.z for tests in found.values() for one in tests.values()) < CRITICAL_Z, found


# ---- the mistakes, enumerated ----------------------------------------------------------------------------------------


def sampled(case: Case, temperature: float) -> Tensor:
    """What the draft samples from after every two tokens, by definition: [V, V, V]."""
    z_VVV = models(case.vocab)[1].table_VVV.double() / temperature
    least_VV1 = z_VVV.topk(int(case.speculation.get("top_m", case.vocab)), dim=2).values[..., -1:]  # type: ignore[call-overload]
    z_VVV = z_VVV.masked_fill(z_VVV < least_VV1, -torch.inf)
    c, f = case.speculation.get("saguaro_c", 1.0), case.speculation.get("saguaro_f", 4)
    return torch.softmax(saguaro_logits(z_VVV, c, f), dim=2)  # type: ignore[arg-type]


def drafted(case: Case, temperature: float) -> Tensor:
    """The draft's whole distribution."""
    return next_tokens(models(case.vocab)[1].table_VVV, temperature)


def rule_of(mutate: Mutate, case: Case, temperature: float) -> Rule:
    """What a mutant does."""
    p_VVV, q_VVV, whole_VVV = case.law(temperature), sampled(case, temperature), drafted(case, temperature)
    if mutate is token_equality:
        return verification(p_VVV, q_VVV, accepts=lambda p, q: p)
    if mutate is residual_of_the_unmodified_q:
        return verification(p_VVV, q_VVV, residual_VVV=whole_VVV)
    assert mutate is missing_renormalisation
    return verification(p_VVV, q_VVV, verified_VVV=torch.where(q_VVV > 0, whole_VVV, 0.0))


def effects(case: Case, rule: Rule, temperature: float) -> dict[str, tuple[float, ChiSquare]]:
    """w, and what the statistics of one temperature have for noncentrality, with the samples that the tests take."""
    p_VVV, size = case.law(temperature), case.vocab
    rounds = Rounds(p_VVV, rule, LOOKAHEAD)
    found = {}
    for test, context, length, windows, law in (
        ("single", 2, 1, TOKENS - 2, p_VVV.reshape(size**2, size)),
        ("joint", 1, WINDOW, (TOKENS - 1) // WINDOW, joint_law(p_VVV[0], WINDOW)),
    ):
        chances_CX = rounds.law(context, length)
        expected_CX = law * chances_CX.sum(dim=1, keepdim=True)
        w = float(((chances_CX - expected_CX) ** 2 / expected_CX).sum() ** 0.5)
        found[test] = (w, ChiSquare.of(REQUESTS * windows * chances_CX, law))
    return found


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("mutate", ENUMERATED)
def test_the_power_is_what_the_docstring_says(mutate: Mutate, temperature: float) -> None:
    """So many samples are taken that even the smallest effect is found in 99 cases of 100."""
    case = awaited(MUTANTS[mutate])
    w, noncentral = effects(case, rule_of(mutate, case, temperature), temperature)["single"]
    assert w == pytest.approx(ENUMERATED[mutate][TEMPERATURES.index(temperature)], abs=0.01)
    assert noncentral.power > 0.99


def test_the_power_is_that_of_the_noncentral_chi_square() -> None:
    """Against draws: (N + sqrt(lambda))^2 and 8 more squares of normals."""
    normal = torch.randn(200_000, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for noncentrality in (10.0, 40.0):
        normal_N9 = normal + torch.tensor([noncentrality**0.5] + [0.0] * 8)
        found = torch.tensor([ChiSquare(one, 9).z > CRITICAL_Z for one in (normal_N9**2).sum(dim=1).tolist()])
        assert ChiSquare(noncentrality, 9).power == pytest.approx(float(found.double().mean()), abs=0.005)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_right_rule_emits_the_targets_law_to_the_last_digit(row: str, temperature: float) -> None:
    """Jointly over three tokens of two rounds, by summation: whatever the draft samples from."""
    case = ROWS[row]
    p_VVV = case.law(temperature)
    rounds = Rounds(p_VVV, verification(p_VVV, sampled(case, temperature)), LOOKAHEAD)
    chances_CX = rounds.law(1, WINDOW)
    expected_CX = joint_law(p_VVV[0], WINDOW) * chances_CX.sum(dim=1, keepdim=True)
    torch.testing.assert_close(chances_CX, expected_CX, atol=1e-13, rtol=1e-9)
