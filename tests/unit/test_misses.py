"""The measure of forced misses: its arithmetic; its leader forgets one sequence a round and changes no token."""

from __future__ import annotations

from pathlib import Path

import pytest

import tests.engines
from ops.bench.forgetful_rank import BATCH, ROUNDS, ForgetfulSpeculator
from ops.bench.misses import RecordedRound, rates, read_rounds, report
from ssd_runtime.config import EngineConfig, SpeculationConfig
from tests.engines import in_process, request
from tests.tiny_models import tiny_decoder


def test_rates_count_full_rounds_and_leave_the_victim_out() -> None:
    rounds = [
        RecordedRound("forced:0", 0.0, None, (True,), (9,)),  # not all are there yet
        RecordedRound("forced:0", 1.0, 0, (False, True), (1, 3)),
        RecordedRound("forced:0", 1.5, 1, (True, False), (4, 1)),
        RecordedRound("forced:0", 2.0, 0, (False, False), (1, 2)),
        RecordedRound("forced:0", 4.0, 1, (True, True), (9, 9)),  # nothing says when it ended
        RecordedRound("forced:1", 5.0, 0, (False, True), (9, 9)),
    ]
    found = rates(rounds, 2)
    assert found.rounds == 3
    assert found.hits == pytest.approx(2 / 3)
    assert found.round_ms == pytest.approx(1000.0)
    assert found.hitting_row == pytest.approx((3 + 4) / (0.5 + 0.5))
    assert found.spared_row == pytest.approx((3 + 4 + 2) / (0.5 + 0.5 + 2.0))
    assert found.batch == pytest.approx((4 + 5 + 3) / 3.0)


def test_the_report_compares_both_arms_over_all_and_repeat_by_repeat() -> None:
    rounds = [
        RecordedRound(f"{arm}:{repeat}", number * seconds, None, (True, True), (4, 4))
        for repeat in range(2)
        for arm, seconds in (("clean", 1.0), ("forced", 1.25 + repeat))
        for number in range(3)
    ]
    found = report(rounds, 2, {"a": {(1, 2)}})
    assert found.kept == pytest.approx(2.0 / (1.25 + 2.25))
    assert list(found.kept_by_repeat) == pytest.approx([1 / 1.25, 1 / 2.25])
    assert found.identical
    assert not report(rounds, 2, {"a": {(1, 2), (1, 3)}}).identical


def test_one_sequence_a_round_is_forgotten_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ROUNDS, str(tmp_path / "rounds"))
    monkeypatch.setenv(BATCH, "4")
    monkeypatch.setattr(tests.engines, "LinkSpeculator", ForgetfulSpeculator)
    engine = EngineConfig(max_model_len=128, max_num_seqs=4, block_size=16)
    # The twin is always right: a miss is the forced one, or none is.
    process = in_process(tiny_decoder(1), tiny_decoder(1), engine, SpeculationConfig(lookahead=3, budget=4), steps=6)
    tokens = {}
    for run in ("clean:0", "forced:0"):
        asked = [request((3 + i, 5, 7), max_tokens=60, request_id=f"{run}:{i}") for i in range(4)]
        tokens[run] = [sequence.tokens for sequence in process.run(asked)]
    assert tokens["clean:0"] == tokens["forced:0"]
    full = [one for one in read_rounds(tmp_path / "rounds") if len(one.hits) == 4]
    clean, forced = ([one for one in full if one.run == run] for run in ("clean:0", "forced:0"))
    assert len(forced) > len(clean) > 10
    assert all(one.victim is None for one in clean)
    steady = forced[3:10]  # neither right after a prompt, which the draft computes too, nor at the ends of the texts
    assert all([row for row, hit in enumerate(one.hits) if not hit] == [one.victim] for one in steady)
    assert {one.victim for one in steady} == {0, 1, 2, 3}
