"""The study: chances against their definitions, walks over text against the runtime, the command from end to end."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor

from launcher.bench.prompts import Prompt
from launcher.cli import main
from launcher.study import folder, live, page
from launcher.study.coupling import Rejection, Rule, Variant, reject
from launcher.study.figures import POLICIES, Point
from launcher.study.recording import Pass, Record, Text, write_texts
from launcher.study.walk import Rate, expect, miss_rates, walk
from ssd_runtime.comm.control.client_messages import Chunk, Finished, Generate
from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.errors import ConfigError
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.load import decoder_from_weights
from ssd_runtime.speculation.drafting.policies import fan_out_policy
from ssd_runtime.speculation.planning import planner
from ssd_runtime.speculation.rejection.saguaro import saguaro_logits
from ssd_runtime.speculation.types import SamplingParams
from tests.engines import in_process, request
from tests.tiny_models import CPU, RandomWeights, tiny_architecture, write_hf
from tests.unit.test_bench import Player

K, B = 4, 10
PROMPT = tuple(range(5, 20))


@pytest.fixture(scope="module")
def pair() -> tuple[Decoder, Decoder]:
    """A target and a relative that often guesses right."""
    found = []
    for noise in (0.0, 0.08):
        weights = RandomWeights(tiny_architecture(), seed=1)
        generator = torch.Generator().manual_seed(2)
        for name, tensor in weights._tensors.items():
            weights._tensors[name] = tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
        found.append(decoder_from_weights(weights, "fp32", CPU))
    return found[0], found[1]


def recorded(pair: tuple[Decoder, Decoder], temperature: float, max_tokens: int = 80) -> tuple[Text, Record]:
    params = SamplingParams(temperature=temperature, seed=3)
    (text,) = write_texts(pair[0], [PROMPT], params, max_tokens, (), lambda step: None)
    rules = [Rule(c, 2) for c in (1.0, 0.4)]
    return text, Pass(*pair, 96, K, B + 2, rules).record(text)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", ["uniform", "geometric", "confidence"])
def test_a_walk_over_text_is_what_the_runtime_does(
    pair: tuple[Decoder, Decoder], monkeypatch: pytest.MonkeyPatch, temperature: float, policy: str
) -> None:
    # A walk knows no time: after a miss it waits for the whole branch.
    monkeypatch.setattr(planner, "waiting_pays", lambda *costs: True)
    text, record = recorded(pair, temperature)
    rounds = list(walk(record, K, fan_out_policy(policy), B))
    speculation = SpeculationConfig(lookahead=K, budget=B, recycle=0, fan_out=policy)
    process = in_process(*pair, EngineConfig(max_model_len=128), speculation, steps=4 * K)
    (sequence,) = process.run([request(PROMPT, lookahead=K, max_tokens=80, params=text.params)])
    assert tuple(sequence.tokens[len(PROMPT) :]) == text.output
    _, *verified = next(iter(process.deltas.values()))  # the first comes from the prefill
    assert [one.num_accepted + 1 for one in rounds] == [len(delta.token_ids) for delta in verified[: len(rounds)]]
    statistics = sequence.statistics()
    # The runtime also asks for the prefill's outcome, and for those of the last rounds, which the walk leaves out.
    others = statistics.lookups - len(rounds)
    hits = sum(one.hit for one in rounds)
    # Nor does it go on with a fork that looked good before all positions were ranked, as `confidence` may there.
    early = B if policy == "confidence" else 0
    assert hits <= statistics.hits <= hits + others + early
    assert others < 8
    assert 3 < hits < len(rounds)


def test_the_miss_rate_falls_with_the_fan_out_and_ends_where_all_is_prepared(pair: tuple[Decoder, Decoder]) -> None:
    _, record = recorded(pair, 1.0)
    walks = [list(walk(record, K, fan_out_policy("uniform"), 1))]
    rates = [miss_rates(walks, fan_out)[0].value for fan_out in (1, 4, 96)]
    assert rates[0] > rates[1] > rates[2] == 0.0


def variant_oracle(p_V: Tensor, q_V: Tensor, z_V: Tensor, chosen: int) -> tuple[float, float, float]:
    """`Variant` of one position by definition: over all pairs of a draft token and its fate.

    Args:
        p_V, q_V: what target and draft sample from.
        z_V: the draft's logits, by which candidates are ranked.
    """
    accepted_V = torch.minimum(torch.ones_like(p_V), p_V / q_V.clamp(min=1e-300))
    joint_V = q_V * (1.0 - accepted_V)  # of the draft's token and its rejection
    residual_V = (p_V - q_V).clamp(min=0.0)
    emitted_by_draft = float(q_V[chosen] * accepted_V[chosen])
    emitted = emitted_by_draft
    if joint_V.sum() > 0:
        emitted += float(joint_V.sum() * residual_V[chosen] / residual_V.sum())
    above = float(joint_V[z_V > z_V[chosen]].sum() / joint_V.sum()) if joint_V.sum() > 0 else 0.0
    return float((q_V * accepted_V).sum()), emitted_by_draft / emitted, above


@pytest.mark.parametrize("c", [1.0, 0.5, 0.0])
def test_chances_under_rejection_are_those_of_the_definition(c: float) -> None:
    generator = torch.Generator().manual_seed(int(10 * c))
    params = SamplingParams(temperature=0.8)
    target_RV, draft_RV = 2 * torch.randn(6, 9, generator=generator), 2 * torch.randn(6, 9, generator=generator)
    chosen_R = torch.randint(9, (6,), generator=generator)
    rule = Rule(c, 3, top_m=9)
    found = reject(target_RV, draft_RV, chosen_R, params, [rule]).variants[rule]
    for row in range(6):
        p_V = torch.softmax(target_RV[row].double() / 0.8, 0)
        q_V = torch.softmax(saguaro_logits(draft_RV[row, None].double() / 0.8, c, 3)[0], 0)
        expected = variant_oracle(p_V, q_V, draft_RV[row], int(chosen_R[row]))
        mine = (found.acceptance_R[row], found.accepted_R[row], found.above_R[row])
        assert [float(value) for value in mine] == pytest.approx(expected, abs=1e-6)


def test_expected_rounds_are_the_mean_of_random_ones() -> None:
    generator = random.Random(5)
    ranks = [generator.choice((0, 0, 0, 1, 2, 3)) for _ in range(24)]
    accepted = [generator.uniform(0.3, 1.0) if rank < 2 else 0.0 for rank in ranks]
    above = [generator.random() for _ in ranks]
    variant = Variant(torch.ones(24), torch.tensor(accepted).double(), torch.tensor(above).double())
    counts = [1, 2, 1, 2]
    expected = expect(Rejection(torch.tensor(ranks), {}), [variant] * 3, counts)
    rounds, hits, times = 0, 0, 4000
    for _ in range(times):
        start = 1
        while start + 3 < 24:
            k = next((k for k in range(3) if generator.random() >= accepted[start + k]), 3)
            place = start + k
            passed = k < 3 and generator.random() < above[place]  # the rejected token stood before it
            rounds, hits = rounds + 1, hits + (ranks[place] - passed < counts[k])
            start = place + 1
    assert sum(expected.rounds) == pytest.approx(rounds / times, rel=0.02)
    assert sum(expected.hits) == pytest.approx(hits / times, rel=0.03)


def test_a_rate_has_the_error_of_its_texts() -> None:
    assert Rate.over([(1, 2), (1, 2)]) == Rate(0.5, 0.0, 4)
    assert Rate.over([(0, 2), (2, 2)]).error == pytest.approx(2**0.5 / 4)
    assert Rate.over([]).value is None


def test_live_figures_measure_every_policy_and_backup_as_often_as_they_say() -> None:
    asked: list[tuple[str, ...]] = []
    steps: list[str] = []

    @contextmanager
    def engines(overrides: tuple[str, ...]) -> Iterator[Player]:
        asked.append(overrides)
        yield Player()

    prompts = [Prompt(name, "s", name) for name in "abc"]
    speeds = live.figure4_speed(prompts, [0.0, 1.0], 13, 4)
    points = speeds.measure(engines, steps.append)
    assert len(steps) == speeds.num_steps
    names = ["ar", "sd", "ssd, uniform", "ssd, geometric", "ssd, confidence"]
    assert list(dict.fromkeys(point.series for point in points)) == names
    ssd = [(point.y, point.over_sd) for point in points if point.series.startswith("ssd")]
    assert ssd == [(pytest.approx(400.0), pytest.approx(4.0))] * 6
    steps.clear()
    batches = live.figure6(prompts, [1, 2], 13, 4)
    assert len(batches.measure(engines, steps.append)) == 2 * (2 + len(live.backups()))
    assert len(steps) == batches.num_steps
    assert {overrides[0] for overrides in asked[3:]} == {f"speculation.backup={name}" for name in live.backups()}


class Drifting(Player):
    """Every engine is slower than the one before."""

    engines = 0

    def __init__(self) -> None:
        super().__init__()
        Drifting.engines += 1
        self._factor = Drifting.engines

    def generate_together(self, requests: list[Generate]) -> Iterator[Chunk | Finished]:
        for event in super().generate_together(requests):
            if isinstance(event, Finished):
                seconds = event.statistics.decode_seconds * self._factor
                event = replace(event, statistics=replace(event.statistics, decode_seconds=seconds))
            yield event


def test_what_the_machine_does_between_two_engines_is_not_in_the_ratio_to_sd() -> None:
    prompts = [Prompt("a", "s", "a")]
    figure = live.figure4_speed(prompts, [0.0], 13, 4)
    points = figure.measure(lambda overrides: nullcontext(Drifting()), lambda done: None)
    found = {point.series: point for point in points}
    ssd = [found[f"ssd, {policy}"] for policy in POLICIES]
    assert [point.y for point in ssd] == [pytest.approx(400 / factor) for factor in (1, 2, 3)]
    assert [point.over_sd for point in ssd] == [pytest.approx(4.0)] * 3
    speeds = [100.0, 50.0, 100 / 3]
    assert found["sd"].y == pytest.approx(mean(speeds))
    assert found["sd"].error == pytest.approx(stdev(speeds) / 3**0.5)


OLD_COLUMNS = "figure,series,temperature,x,y,error,rounds,note"


def old_study(path: Path, about: dict[str, Any] | None = None, **figures: str) -> Path:
    """A directory as it was written before ratios to SD were, of one run; `about` says what is other in study.json."""
    path.mkdir()
    run = {"command": "ssd study --out here", "machine": "cpu X, cores 0-1", "date": "2026-01-02"}
    run |= {"num_prompts": 36, "max_tokens": 128}
    subject = {"target": "big bf16", "draft": "small int8", "lookahead": 6, "budget": 24}
    other = about or {}
    known = {"format": 1, "subject": {**subject, **other}}
    known["figures"] = {name: {**run, **other} for name in (stem.removeprefix("figure") for stem in figures)}
    (path / "study.json").write_text(json.dumps({**known, **other}))
    for stem, row in figures.items():
        (path / f"{stem}.csv").write_text(f"{OLD_COLUMNS}\n{row}\n")
    return path


def test_a_study_takes_in_figures_measured_elsewhere_and_keeps_remarks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = old_study(tmp_path / "here", figure4="4,uniform,0.0,0.0,0.75,0.1,7,2.5")
    (here / "REMARKS.md").write_text("## What it says\n\nMuch.\n")
    later = {"date": "2026-03-04", "num_prompts": 8}
    live = {"figure6": "6,sd,0.0,2,10.5,,7,", "figure4": "4,uniform,0.0,0.0,0.5,0.1,7,2.5"}
    there = old_study(tmp_path / "there", later, **live)
    command = ["study", "--out", str(here), "--merge", str(there)]
    assert main(command) == 0, capsys.readouterr().err
    text = (here / "README.md").read_text()
    assert "## What it says\n\nMuch.\n" in text
    assert "2026-01-02, cpu X, cores 0-1; 36 prompts, up to 128 tokens each; numbers: figure4.csv" in text
    assert "2026-03-04, cpu X, cores 0-1; 8 prompts, up to 128 tokens each; numbers: figure6.csv" in text
    assert text.count("    ssd study --out here\n") == 2
    assert "| uniform | 0.750 ± 0.100 |" in text  # what was here stays
    assert "| sd | 10.5 |" in text
    assert "ar and sd ran in the first of them" in text
    assert all((here / f"figure{figure}.png").read_bytes().startswith(b"\x89PNG") for figure in (4, 6))
    # Drawn again, all is the same.
    assert main(["study", "--out", str(here), "--redraw"]) == 0
    assert (here / "README.md").read_text() == text
    assert (here / "figure4.csv").read_text().startswith(OLD_COLUMNS + "\n")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"lookahead": 5}, "holds a study with lookahead = 6, not 5"),
        ({"draft": "small int4"}, "holds a study with draft = small int8, not small int4"),
        ({"format": 2}, "study.json: Invalid value 2 - at `$.format`"),
        ({"num_prompts": "many"}, "study.json: Expected `int`, got `str`"),
    ],
)
def test_a_study_of_something_else_is_not_taken_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], about: dict[str, Any], message: str
) -> None:
    here = old_study(tmp_path / "here", figure4="4,uniform,0.0,0.0,0.75,0.1,7,2.5")
    there = old_study(tmp_path / "there", about, figure6="6,sd,0.0,2,10.5,,7,")
    assert main(["study", "--out", str(here), "--merge", str(there)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (here / "figure6.csv").exists()


def test_points_are_read_as_they_were_written(tmp_path: Path) -> None:
    points = (Point("6", "ssd, backup none", 0.0, 2, 0.1 + 0.2, None, 7, 0.5, 1 / 3), Point("6", "ar", 0.0, 4.0, None))
    run = folder.Run("ssd study", "cpu", "2026-01-02", 3, 8)
    study = folder.start(tmp_path, folder.Subject("a", "b", 3, 6))
    study = study.grown(study.subject, {"6": folder.Figure(run, points)})
    study.save(["6"])
    assert folder.load(tmp_path) == study
    (tmp_path / "figure3.csv").write_text(OLD_COLUMNS + "\n")
    with pytest.raises(ConfigError, match=r"nothing says how .*figure3\.csv was measured"):
        folder.load(tmp_path)


def test_the_page_says_where_the_order_of_policies_and_the_dominance_do_not_hold() -> None:
    points = [Point("4", name, 1.0, 1.0, y) for name, y in (("uniform", 0.7), ("geometric", 0.8), ("confidence", 0.6))]
    assert page.order_of_policies(points) == [
        "- T = 1: geometric 0.800, uniform 0.700, confidence 0.600 (not the order that was hoped for)."
    ]
    points = [Point("5", "rejection, uniform", 1.0, x, y, note=c) for c, x, y in ((1.0, 0.9, 0.5), (0.5, 0.7, 0.6))]
    (line,) = page.dominance([*points, Point("5", "shared noise, uniform", 1.0, 0.8, 0.7)])
    assert "higher hit rate and acceptance than C = 0.5; higher hit rate at lower acceptance than C = 1;" in line


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name two tiny models."""
    root = tmp_path_factory.mktemp("study")
    paths = {"target": write_hf(root / "target"), "draft": write_hf(root / "draft", noise=0.05)}
    sizes = ["--set", "speculation.lookahead=3", "--set", "speculation.budget=6", "--set", "engine.max_model_len=512"]
    dtypes = [argument for role in paths for argument in ("--set", f"{role}.dtype=fp32")]
    return [
        *(argument for role, path in paths.items() for argument in ("--set", f"{role}.model={path}")),
        *dtypes,
        *sizes,
    ]


def test_the_command_writes_numbers_pictures_and_a_page(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = tmp_path / "text.recording"
    arguments = ["--limit", "2", "--max-tokens", "24", "--temperatures", "0,1", "--offline"]
    command = ["study", *models, *arguments, "--recording", str(recording), "--out"]
    assert main([*command, str(tmp_path / "first")]) == 0, capsys.readouterr().err
    written = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    numbers, pictures = ([f"figure{figure}.{ending}" for figure in (3, 4, 5)] for ending in ("csv", "png"))
    assert set(written) == {"README.md", "study.json", *numbers, *pictures}
    assert all(written[name].startswith(b"\x89PNG") for name in pictures)
    with (tmp_path / "first" / "figure4.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["series"], row["temperature"]) for row in rows} >= {("confidence", "0.0"), ("uniform", "1.0")}
    assert all(0.0 <= float(row["y"]) <= 1.0 for row in rows)
    text = written["README.md"].decode()
    assert "K = 3, B = 6" in text
    assert text.count("2 prompts, up to 24 tokens each") == 1
    assert text.count("Measured as above") == 2
    assert all(name in text for name in (*numbers, *pictures))
    # Again from the recording: the same numbers.
    assert main([*command, str(tmp_path / "second")]) == 0
    for name in numbers:
        assert (tmp_path / "second" / name).read_bytes() == written[name]
    # Another run into the same directory adds to what is there, if it is of the same pair and sizes.
    assert main([*command, str(tmp_path / "first"), "--figures", "3"]) == 0
    assert (tmp_path / "first" / "figure4.csv").read_bytes() == written["figure4.csv"]
    assert all(name in (tmp_path / "first" / "README.md").read_text() for name in numbers)
    assert main([*command, str(tmp_path / "first"), "--set", "speculation.budget=7"]) == 2
    assert "holds a study with budget = 6, not 7; give --out another directory" in capsys.readouterr().err
    # A recording of something else is refused.
    assert main([*command, str(tmp_path / "third"), "--temperatures", "0.5"]) == 2
    assert "was made with temperatures = [0.0, 1.0], not [0.5]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--figures", "3,7"], "there is no figure '7'"),
        (["--figures", "6", "--offline"], "needs an engine"),
        (["--figures", "3,5", "--live"], "needs no engine"),
        (["--live", "--offline"], "leave nothing to do"),
        (["--redraw"], "no figure in"),
        (["--merge", "/nowhere"], "no figure in /nowhere to take"),
        (["--temperatures", "warm"], "expected numbers"),
        (["--temperatures", "-1"], "between 0 and 100"),
        (["--max-tokens", "8", "--set", "speculation.lookahead=6"], "at least 9"),
        (["--prompts", "/nowhere.jsonl"], "cannot read prompts"),
        (["--batch", "0"], "--batch"),
        (["--out", "/proc/study"], "cannot write into"),
    ],
)
def test_bad_input_is_one_line(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert main(["study", *models, *out, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ssd: error: ")
    assert error.count("\n") == 1
    assert message in error
