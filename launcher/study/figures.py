"""The figures that follow from recorded text, as tables: one row a point. Knows no models and draws nothing."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from launcher.study.coupling import Rule
from launcher.study.recording import Record
from launcher.study.walk import Expected, Rate, WalkedRound, expect, miss_rates, walk
from ssd_runtime.speculation.drafting.counts import uniform_counts
from ssd_runtime.speculation.drafting.policies import FanOutName, fan_out_policy

FAN_OUTS = (1, 2, 4, 8, 16, 32, 64, 128)
POLICIES: tuple[FanOutName, ...] = ("uniform", "geometric", "confidence")
CS = (1.0, 0.9, 0.75, 0.6, 0.45, 0.3, 0.15, 0.05, 0.02, 0.0)


class Point(Struct, frozen=True, forbid_unknown_fields=True):
    """One point of a figure, and one line of its CSV.

    Attributes:
        series: which curve, in words.
        x, y: what is drawn; units are the figure's.
        error: standard error of y, from the spread over texts (of speeds: over engines); None if measured once.
        rounds: how many rounds (or tokens) y rests on; expected ones under coupling "rejection".
        note: a further number of the same point, named by the figure.
        over_sd: of a speed: over that of mode sd in the same engine; None where sd was not measured there.
    """

    figure: str
    series: str
    temperature: float
    x: float
    y: float | None
    error: float | None = None
    rounds: float | None = None
    note: float | None = None
    over_sd: float | None = None


def rules_for(lookahead: int, budget: int) -> list[Rule]:
    """Every rule that Figures 3 and 5 need: C = 1, and Saguaro's C with F the uniform fan-out at each position."""
    return [Rule(c, fan_out) for c in CS for fan_out in sorted(set(uniform_counts(budget, lookahead)))]


def by_temperature(records: Sequence[Record]) -> list[tuple[float, list[Record]]]:
    """The records of each temperature, ascending."""
    temperatures = sorted({record.temperature for record in records})
    return [(heat, [record for record in records if record.temperature == heat]) for heat in temperatures]


def figure3(records: Sequence[Record], lookahead: int) -> list[Point]:
    """Miss rate over the fan-out F at every position: after hits ("hit") and after misses ("miss")."""
    points: list[Point] = []
    for temperature, some in by_temperature(records):
        walks = [list(walk(record, lookahead, fan_out_policy("uniform"), 1)) for record in some]
        for fan_out in FAN_OUTS:
            rates = dict(zip(("hit", "miss"), miss_rates(walks, fan_out), strict=True))
            for after, rate in rates.items():
                points.append(_point("3", f"shared noise, after a {after}", temperature, fan_out, rate))
            if temperature > 0:
                expected = _expected(some, 1.0, [fan_out] * (lookahead + 1))
                for after in ("hit", "miss"):
                    rate = Rate.over([one.misses(after == "hit") for one in expected])
                    points.append(_point("3", f"rejection, after a {after}", temperature, fan_out, rate))
    return points


def figure4(records: Sequence[Record], lookahead: int, budget: int) -> list[Point]:
    """Hit rate of whole outcomes over temperature, for each fan-out policy at the same budget; note: tokens a round."""
    points = []
    for temperature, some in by_temperature(records):
        for policy in POLICIES:
            walks = walks_of(some, lookahead, budget, policy)
            points.append(_point("4", policy, temperature, temperature, hit_rate(walks), tokens_per_round(walks)))
    return points


def figure5(records: Sequence[Record], lookahead: int, budget: int) -> list[Point]:
    """Hit rate (y) against acceptance (x): rejection with Saguaro's C (note), and shared noise under each policy."""
    points = []
    counts = uniform_counts(budget, lookahead)
    for temperature, some in by_temperature(records):
        if not temperature:
            continue  # both couplings are the same thing there
        for c in sorted({rule.c for record in some if record.rejection for rule in record.rejection.variants})[::-1]:
            hits = Rate.over([(sum(one.hits), sum(one.rounds)) for one in _expected(some, c, counts)])
            points.append(_point("5", "rejection, uniform", temperature, _acceptance(some, c, counts), hits, c))
        agreeing = sum(rank == 0 for record in some for rank in record.ranks)
        acceptance = agreeing / sum(len(record.ranks) for record in some)
        for policy in POLICIES:
            walks = walks_of(some, lookahead, budget, policy)
            points.append(_point("5", f"shared noise, {policy}", temperature, acceptance, hit_rate(walks)))
    return points


def walks_of(records: Sequence[Record], lookahead: int, budget: int, policy: FanOutName) -> list[list[WalkedRound]]:
    """The rounds of every text under one policy, which learns from text to text."""
    learning = fan_out_policy(policy)
    return [list(walk(record, lookahead, learning, budget)) for record in records]


def hit_rate(walks: Sequence[Sequence[WalkedRound]]) -> Rate:
    """Of whole outcomes."""
    return Rate.over([(sum(one.hit for one in rounds), len(rounds)) for rounds in walks])


def tokens_per_round(walks: Sequence[Sequence[WalkedRound]]) -> float | None:
    """Accepted tokens and the bonus token."""
    rounds = [one for some in walks for one in some]
    return sum(one.num_accepted + 1 for one in rounds) / len(rounds) if rounds else None


def _expected(records: Sequence[Record], c: float, counts: Sequence[int]) -> list[Expected]:
    expected = []
    for record in records:
        assert record.rejection is not None
        known = record.rejection.variants
        some = min(rule.fan_out for rule in known)  # with C = 1 every fan-out is the same rule
        rules = [Rule(c, fan_out if c < 1.0 else some) for fan_out in counts[:-1]]
        expected.append(expect(record.rejection, [known[rule] for rule in rules], counts))
    return expected


def _acceptance(records: Sequence[Record], c: float, counts: Sequence[int]) -> float:
    """Mean chance that a draft token is accepted, over all places of the text and positions of a speculation."""
    total, places = 0.0, 0
    for record in records:
        assert record.rejection is not None
        for fan_out in counts[:-1]:
            acceptance_R = record.rejection.variants[Rule(c, fan_out)].acceptance_R
            total, places = total + float(acceptance_R.sum()), places + len(acceptance_R)
    return total / places


def _point(figure: str, series: str, temperature: float, x: float, rate: Rate, note: float | None = None) -> Point:
    return Point(figure, series, temperature, x, rate.value, rate.error, rate.whole, note)
