"""How deep and how wide to draft, online: K and B of the next round, down to no speculation at all; and after a miss,
how long to wait for the draft. Knows no clock.

Two questions, two ways to answer them. *How much* is a model: Theorem 7 of arXiv 2603.03251 with measured costs, so
that the tree fits inside one verification where that pays. *Whether at all* is measured: the planner keeps the tokens
per second of rounds with and without speculation, for each batch size, and looks at the other side now and then, ever
less often. What it decides changes when tokens come and never which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ssd_runtime.speculation.planning.cost_model import CostModel, expected_tokens
from ssd_runtime.speculation.types import Plan

FIRST_LOOK = 24  # rounds before plain decoding is tried for the first time
LONGEST_INTERVAL = 4096
PLAIN_ROUNDS, SPECULATING_ROUNDS = 2, 10  # of a look at the other side
COLD_ROUNDS = {False: 1, True: 3}  # of these, the first ones say nothing: a step still runs; nothing is drafted yet
REPLAN = 16  # rounds between two choices of K and B
CLEARLY = 0.97  # less than 3 % is no reason to draft less
MISS_EXPONENT = 0.75  # of the power law of missing over B; Figure 3 of the paper at T = 0
# A verification that could be spared also spares the draft: on one machine they share the memory's bandwidth. With
# equal expected speed the longer speculation was measurably the faster one, hence a tenth in favour of waiting.
PATIENCE = 1.1


class Planner(Protocol):
    """Decides before a round, learns after it."""

    def plan(self, sequences: int) -> Plan:
        """For the round of so many sequences that begins now: its speculations, and the drafting during it."""

    def observe(self, round: MeasuredRound) -> None:
        """The planned round has ended."""

    def forget(self) -> None:
        """A draft has come or gone: what speculation brings is to be found out anew."""


@dataclass(frozen=True)
class MeasuredRound:
    """What a round was.

    Attributes:
        sequences, tokens: in the batch; that came out of it.
        seconds: waiting and verification.
        hits, lookups: of the speculation cache.
    """

    sequences: int
    tokens: int
    seconds: float
    hits: int = 0
    lookups: int = 0


class FixedPlanner:
    """The same K and B in every round."""

    def __init__(self, lookahead: int, budget: int) -> None:
        self._plan = Plan(lookahead, budget)

    def plan(self, sequences: int) -> Plan:
        return self._plan

    def observe(self, round: MeasuredRound) -> None:
        pass

    def forget(self) -> None:
        pass


@dataclass
class _Ratio:
    """Of two sums over the last rounds: tokens a second, misses a lookup."""

    above: float = 0.0
    below: float = 0.0

    def observe(self, above: float, below: float) -> None:
        keep = 0.9
        self.above, self.below = keep * self.above + above, keep * self.below + below


@dataclass
class _Batch:
    """What is known of one batch size."""

    rates: dict[bool, _Ratio] = field(default_factory=lambda: {True: _Ratio(), False: _Ratio()})  # tokens a second
    speculates: bool = True  # what is in force, looks aside
    since_look: int = 0
    interval: int = FIRST_LOOK
    looking: int = 0  # rounds left of a look at the other side


class AdaptivePlanner:
    """K and B by measurement.

    Args:
        lookahead, budget: the most of each.
        costs: what was measured; kept up to date by whoever runs the rounds.
    """

    def __init__(self, lookahead: int, budget: int, costs: CostModel) -> None:
        self._most = Plan(lookahead, budget)
        self._costs = costs
        self._now = self._most
        self.forget()

    def forget(self) -> None:
        self._batches: defaultdict[int, _Batch] = defaultdict(_Batch)  # by sequences
        self._chosen: dict[int, tuple[int, Plan]] = {}  # sequences -> rounds it has served, K and B
        self._misses = _Ratio()  # of lookups, at the chosen budget
        self._same = 0  # rounds in a row that speculated, or did not

    # -- whether -------------------------------------------------------------------------------------------------

    def plan(self, sequences: int) -> Plan:
        speculates = self._most.lookahead > 0 and self._whether(self._batches[sequences])
        now = self._how_much(sequences) if speculates else Plan(0, 0)
        self._same = self._same + 1 if bool(now.lookahead) == bool(self._now.lookahead) else 0
        self._now = now
        return now

    def _whether(self, batch: _Batch) -> bool:
        if batch.looking:
            batch.looking -= 1
            if not batch.looking:
                self._conclude(batch)
        elif batch.since_look >= batch.interval:
            batch.looking = PLAIN_ROUNDS if batch.speculates else SPECULATING_ROUNDS
            batch.since_look = 0
        else:
            batch.since_look += 1
        return batch.speculates != bool(batch.looking)

    def _conclude(self, batch: _Batch) -> None:
        """A look is over: stay, and look less often; or change, and look again soon."""
        speculating, plain = batch.rates[True], batch.rates[False]
        better = batch.speculates
        if speculating.below and plain.below:
            better = speculating.above / speculating.below > plain.above / plain.below
        batch.interval = min(2 * batch.interval, LONGEST_INTERVAL) if better == batch.speculates else 2 * FIRST_LOOK
        batch.speculates = better

    def observe(self, round: MeasuredRound) -> None:
        speculated = self._now.lookahead > 0
        if self._same >= COLD_ROUNDS[speculated]:
            self._batches[round.sequences].rates[speculated].observe(round.tokens, round.seconds)
            if round.lookups:
                self._misses.observe(round.lookups - round.hits, round.lookups)

    # -- how much ------------------------------------------------------------------------------------------------

    def _how_much(self, sequences: int) -> Plan:
        served, plan = self._chosen.get(sequences, (REPLAN, self._most))
        if served >= REPLAN:
            served, plan = 0, self._best(sequences)
        self._chosen[sequences] = (served + 1, plan)
        return plan

    def _best(self, sequences: int) -> Plan:
        """The largest plan that is as good as the best one, to within what the model can tell."""
        if not self._costs.step.known or not self._costs.verification.known:
            return self._most
        budgets = sorted({max(1, self._most.budget * part // 4) for part in (1, 2, 3, 4)}, reverse=True)
        plans = [Plan(k, b) for k in range(self._most.lookahead, 0, -1) for b in budgets]
        rates = [self._rate(plan, sequences) for plan in plans]
        best = max(rates)
        return next(plan for plan, rate in zip(plans, rates, strict=True) if rate >= CLEARLY * best)

    def _rate(self, plan: Plan, sequences: int) -> float:
        """Expected tokens per second: Theorem 7, with the branch as long as it is when the verification ends.

        Nobody waits for a longer one, nor for a missed sequence of a batch; one alone may wait for the draft.
        """
        costs, k = self._costs, plan.lookahead
        a = costs.acceptance.rate
        verify = costs.verification.at(sequences * (1 + k))
        # One step for the last token of the trunk and the first forks, then one for each token of the branch behind it;
        # bets may save steps.
        steps_per_token = min(1.0, costs.steps_per_token.value or 1.0)
        token_seconds = costs.step.at(sequences * (1 + plan.budget)) * steps_per_token
        length = min(k, int(verify / token_seconds) - 1)
        miss = self._miss(plan.budget) if length >= 1 else 1.0
        hit_tokens = expected_tokens(max(0, length), a)
        plain = costs.verification.at(sequences)
        if sequences > 1:
            return sequences * ((1 - miss) * hit_tokens + miss) / ((1 - miss) * verify + miss * plain)
        just_in_time = verify + k * steps_per_token * costs.step.at(1)
        waits = ((1.0, plain), (expected_tokens(k, a), just_in_time))
        miss_tokens, miss_seconds = max(waits, key=lambda one: one[0] / one[1])
        return ((1 - miss) * hit_tokens + miss * miss_tokens) / ((1 - miss) * verify + miss * miss_seconds)

    def _miss(self, budget: int) -> float:
        """The chance of a miss at a budget, from the misses seen at the present one."""
        seen = (self._misses.above + 0.2) / (self._misses.below + 1.0)
        present = max(1, self._now.budget or self._most.budget)
        return float(min(1.0, seen * (present / budget) ** MISS_EXPONENT))


def waiting_pays(added: float, expected: float, token_seconds: float, round_seconds: float) -> bool:
    """Whether one more just-in-time draft token raises the expected tokens per second of this round.

    A round with the speculations at hand yields `expected` tokens in `round_seconds`; one more token each for those
    that wait adds `added` for `token_seconds` more (the marginal form of Theorem 7 of arXiv 2603.03251; over a batch,
    everybody's tokens come later by that time).
    """
    return added * round_seconds * PATIENCE > expected * token_seconds


def drafted_enough(costs: CostModel, lengths: Sequence[int], most: Sequence[int]) -> bool:
    """Whether the branches that are waited for do as they are, or have all the tokens they may have.

    Args:
        lengths: of the branch of each sequence that waits, as it is now.
        most: the longest speculation of each.
    """
    open_lengths = [length for length, limit in zip(lengths, most, strict=True) if length < limit]
    if not open_lengths:
        return True
    step, token, verify = costs.step_seconds.value, costs.token_seconds.value, costs.verify_seconds.value
    if step is None or token is None or verify is None:
        return False
    # Where drafting is the longer half, a round lasts from the outcome until the draft has got this far again.
    round_seconds = max(verify, step + min(open_lengths) * token)
    acceptance = costs.acceptance.rate
    added = sum(acceptance ** (length + 1) for length in open_lengths)
    expected = sum(expected_tokens(length, acceptance) for length in lengths)
    return not waiting_pays(added, expected, token, round_seconds)
