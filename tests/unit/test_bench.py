"""The benchmark's arithmetic and its comparison of tokens, with a client that plays back what it is told."""

from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from launcher.bench.benchmark import Workload, count_steps, devices_by_mode, measure
from launcher.bench.divergence import Divergence, divergence
from launcher.bench.plan import Run, engines_by_numerics, parse_numbers, plan_runs
from launcher.bench.prompts import Prompt
from launcher.bench.report import Results, join_numerics, results_of
from launcher.bench.scoring import Scorer, logit_gap
from launcher.bench.tables import verdict
from launcher.summary import summarise
from ssd_runtime.comm.control.client_messages import Chunk, Finished, Generate, RequestStatistics, Series, Usage
from ssd_runtime.config import load_config
from ssd_runtime.errors import ConfigError
from ssd_runtime.metrics import Percentiles
from ssd_runtime.speculation.sampling.ranking import Choice, rank_tokens_oracle
from ssd_runtime.speculation.types import SamplingParams
from tests.tiny_models import tiny_decoder

PROMPTS = (Prompt("a", "s", "first"), Prompt("b", "s", "second"))


class Player:
    """Answers with tokens counted from the seed; SSD four times as fast; `broken` changes one token of one mode."""

    def __init__(self, broken: str | None = None) -> None:
        self.broken, self.requests = broken, []

    def generate_together(self, requests: list[Generate]) -> Iterator[Chunk | Finished]:
        for request in requests:
            yield from self._generate(request)

    def _generate(self, request: Generate) -> Iterator[Chunk | Finished]:
        self.requests.append(request)
        tokens = [request.params.seed + i for i in range(request.max_tokens)]
        if request.mode == self.broken and request.messages[0].content == "second":
            tokens[3] = -1
        yield Chunk(request.request_id, "x", tuple(tokens[:2]))
        yield Chunk(request.request_id, "y", tuple(tokens[2:]))
        yield Finished(request.request_id, ("length",), Usage(5, len(tokens)), statistics(request.mode, len(tokens)))


def statistics(mode: str, tokens: int) -> RequestStatistics:
    per_round = 1 if mode == "ar" else 3
    rounds = (tokens - 1) // per_round
    return RequestStatistics(
        mode=mode,
        rounds=rounds,
        num_tokens=tokens,
        num_draft_tokens=4 * rounds if mode != "ar" else 0,
        num_accepted_tokens=2 * rounds if mode != "ar" else 0,
        accepted_per_position=() if mode == "ar" else (rounds, rounds, 0, 0),
        lookups=rounds if mode == "ssd" else 0,
        hits=rounds // 2 if mode == "ssd" else 0,
        prefill_seconds=0.5,
        ttft_seconds=1.0,
        decode_seconds=(tokens - 1) / (400 if mode == "ssd" else 100),
        verify_ms=Series(rounds, 10.0, 10.0, 10.0, 10.0, (10.0,) * rounds),
    )


def measured(client: Player, runs: list[Run], repeat: int = 1) -> Results:
    workload = Workload(PROMPTS, SamplingParams(seed=7), 13, repeat)
    return results_of(measure(client, runs, workload, lambda name: None), PROMPTS)


def test_prefill_and_first_token_are_kept_out_of_the_speed() -> None:
    report = measured(Player(), plan_runs(["ar", "ssd"], [], 4))
    ar, ssd = report.runs
    assert (ar.tokens, ar.tokens_per_second, ar.prefill_seconds) == (26, 100.0, 1.0)
    assert (ssd.tokens_per_second, ssd.speedup) == (400.0, 4.0)
    assert (ar.tokens_per_round, ssd.tokens_per_round) == (1.0, 3.0)
    assert (ssd.hit_rate, ssd.acceptance, ssd.accepted_per_position) == (0.5, 0.5, (8, 8, 0, 0))
    assert (ar.hit_rate, ar.acceptance) == (None, None)
    assert ar.verify_ms == Percentiles(10.0, 10.0)
    assert ar.round_ms == Percentiles(None, None)


def test_warm_ups_are_not_counted() -> None:
    client = Player()
    report = measured(client, plan_runs(["ar", "sd"], [], 4), repeat=2)
    assert [row.requests for row in report.runs] == [4, 4]
    assert len(client.requests) == 2 + 8


def test_modes_take_turns_at_each_prompt_with_the_same_seed() -> None:
    client = Player()
    measured(client, plan_runs(["ar", "sd", "ssd"], [], 4))
    first, second = client.requests[3:6], client.requests[6:]
    assert {r.mode for r in first} == {r.mode for r in second} == {"ar", "sd", "ssd"}
    assert {r.params.seed for r in first} == {7}
    assert {r.params.seed for r in second} == {8}
    assert first[0].mode != second[0].mode


def test_same_tokens_are_reported_as_identical() -> None:
    report = measured(Player(), plan_runs(["ar", "sd", "ssd"], [], 4))
    assert report.identical_tokens is True
    assert report.first_divergence is None
    assert report.compared_outputs == 4


def test_the_first_divergence_is_named() -> None:
    report = measured(Player(broken="ssd"), plan_runs(["ar", "sd", "ssd"], [], 4))
    assert report.identical_tokens is False
    assert report.differing_outputs == 1
    assert report.first_divergence == Divergence(3, "b", 1, ("ar", "ssd"), (11, -1), (8, 9, 10))


def test_a_divergence_is_reported_with_both_tokens_and_the_gap() -> None:
    report = measured(Player(broken="ssd"), plan_runs(["ar", "ssd"], [], 4))
    report = replace(report, first_divergence=replace(report.first_divergence, logit_gap=0.01234))
    assert "b at token 3, 11 in ar against -1 in ssd, +0.0123 logits apart" in verdict(report)


def test_the_gap_of_a_divergence_is_that_of_the_scores_that_were_compared() -> None:
    decoder, text = tiny_decoder(), (5, 6, 7, 8)
    for temperature in (0.0, 0.8):
        params = SamplingParams(temperature=temperature, seed=3)
        (logits_RV,) = list(Scorer(decoder, 8).score((*text, 0), len(text)))
        (ranking,) = rank_tokens_oracle(logits_RV[-1:], [Choice(params, len(text))], 5)
        for token, margin in zip(ranking.tokens, ranking.margins, strict=True):
            assert logit_gap(decoder, text, (ranking.tokens[0], token), params) == pytest.approx(margin, abs=1e-4)


ON_GPUS = ("target.device=cuda", "draft.device=cuda", "draft.dtype=bf16", "deployment.drafts=2")


@pytest.mark.parametrize(
    ("overrides", "cores", "alone", "together"),
    [
        ((), {"target": (0, 1), "draft": (2,)}, 2, 3),
        ((), {"target": (0,), "draft": (0,)}, 1, 1),
        ((), {"target": (0,)}, 1, 2),
        (ON_GPUS, {"target": (0,), "draft 1": (1,), "draft 2": (2,)}, 1, 3),
        ((*ON_GPUS, "deployment.share_gpu=true"), {"target": (), "draft 1": (), "draft 2": ()}, 1, 1),
        (("target.device=cuda",), {"target": (0, 1, 2), "draft": (6, 7)}, 1, 3),
    ],
)
def test_a_core_or_gpu_in_use_counts_once_whoever_shares_it(
    overrides: tuple[str, ...], cores: dict[str, tuple[int, ...]], alone: int, together: int
) -> None:
    found = devices_by_mode(load_config(None, overrides), cores)
    assert found == {"ar": alone, "sd-colocated": alone, "sd": together, "ssd": together}


def test_requests_at_once_are_several_runs_with_the_speed_of_the_whole() -> None:
    client = Player()
    runs = plan_runs(["ar", "ssd"], [], 4, [1, 2])
    assert [(run.name, run.batch) for run in runs] == [("ar", 1), ("ssd", 1), ("ar x2", 2), ("ssd x2", 2)]
    workload = Workload(PROMPTS, SamplingParams(seed=7), 13, devices={"ar": 1, "ssd": 2})
    steps: list[str] = []
    report = results_of(measure(client, runs, workload, steps.append), PROMPTS)
    assert len(steps) == count_steps(runs, workload)
    alone, _, together, ssd = report.runs
    assert (alone.tokens, together.tokens, report.compared_outputs) == (26, 26, 6)
    # Both waited a second for two prefills of half a second each, then took .12 s for 12 tokens after the first.
    assert together.tokens_per_second == pytest.approx(24 / (1.0 + 0.12 - 2 * 0.5))
    assert together.tokens_per_second_per_sequence == pytest.approx(100)
    assert ssd.tokens_per_second_per_device == pytest.approx(ssd.tokens_per_second / 2)
    assert ssd.speedup == pytest.approx(4.0)
    assert together.tpot_ms.p50 == pytest.approx(10.0)
    assert together.ttft_ms.p50 == pytest.approx(1000.0)


@pytest.mark.parametrize("text", ["", "0", "1,x", "2,,3", "-1"])
def test_batches_that_are_no_numbers_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--batch"):
        parse_numbers("--batch", text)


def test_both_numerics_make_one_report_with_their_cost() -> None:
    fast = measured(Player(broken="ssd"), plan_runs(["ar", "ssd"], [], 4))
    invariant = measured(Player(), plan_runs(["ar", "ssd"], [], 4))
    slower = [replace(row, tokens_per_second=row.tokens_per_second / 2) for row in invariant.runs]
    invariant = replace(invariant, runs=tuple(slower))
    report = join_numerics({"fast": fast, "invariant": invariant})
    assert [row.name for row in report.runs] == ["ar", "ssd", "ar invariant", "ssd invariant"]
    assert report.invariant_over_fast == {"ar": 0.5, "ssd": 0.5}
    assert report.identical_tokens is False
    assert report.identical_tokens_by_numerics == {"fast": False, "invariant": True}
    assert (report.differing_outputs, report.compared_outputs) == (1, 4)
    assert join_numerics({"fast": fast}) is fast
    with pytest.raises(ConfigError, match="--numerics: unknown 'exact'"):
        engines_by_numerics("fast,exact", [])


def test_several_lookaheads_of_a_mode_are_several_runs_and_one_is_best() -> None:
    runs = plan_runs(["ar", "sd", "ssd"], ["sd=3,1", "ssd=2"], 4)
    assert runs == [Run("ar", "ar", 0), Run("sd@1", "sd", 1), Run("sd@3", "sd", 3), Run("ssd", "ssd", 2)]
    report = measured(Player(), runs)
    assert sum(row.best for row in report.runs if row.mode == "sd") == 1


@pytest.mark.parametrize(
    ("modes", "lookaheads", "message"),
    [
        (["fast"], [], "unknown mode 'fast'"),
        (["ar", "ar"], [], "twice"),
        (["ar"], ["ssd=2"], "not among the modes"),
        (["ar"], ["ar=2"], "not among the modes"),
        (["ssd"], ["ssd"], "expected MODE=K"),
        (["ssd"], ["ssd=0"], "expected MODE=K"),
        (["ssd"], ["ssd=2,"], "expected MODE=K"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(modes: list[str], lookaheads: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_runs(modes, lookaheads, 4)


@pytest.mark.parametrize(
    ("tokens", "others", "position"),
    [((), (), None), ((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1, 2), (1, 2, 3), 2), ((), (1,), 0)],
)
def test_divergence(tokens: tuple[int, ...], others: tuple[int, ...], position: int | None) -> None:
    assert divergence(tokens, others) == position


def test_a_summary_of_nothing_has_no_rates() -> None:
    summary = summarise([])
    assert summary.tokens == 0
    assert summary.tokens_per_second is None
    assert summary.accepted_per_position == ()
