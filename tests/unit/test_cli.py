"""The command line from outside: one clear line and the right exit code, and never a traceback or needless torch."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher import cli, preflight
from launcher.bench.plan import overrides_for, plan_runs
from ssd_runtime.config import Config
from ssd_runtime.errors import ConfigError
from ssd_runtime.host.cores import about_binding
from tests.tiny_models import write_hf
from tests.unit.test_model_files import gguf_file

RANDOM = ("--set", "target.model=random:tiny", "--set", "draft.model=random:tiny")


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    """Run `ssd`, expect an exit code and exactly one line on standard error; return the line."""
    assert cli.main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("ssd: error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "--prompt"),
        (["generate", "-p", ""], "prompt is empty"),
        (["generate", "-p", "  \n"], "prompt is empty"),
        (["generate", "-p", "x", "--raw", "--prompt", ""], "prompt is empty"),
        (["generate", "-p", "x", "--config", "/nope.toml"], "cannot read config /nope.toml"),
        (["generate", "-p", "x", "--set", "speculation.lookahaed=3"], "did you mean 'lookahead'"),
        (["generate", "-p", "x", "--set", "speculation.lookahead=many"], "must be int"),
        (["generate", "-p", "x", "--set", "target.model=/nope"], "model /nope does not exist"),
        (["generate", "-p", "x", "--set", "draft.model=/nope"], "does not exist"),
        (["generate", "-p", "x", "--set", "target.model=~no-such-user/m"], "does not exist"),
        (["generate", "-p", "x", "--set", "serve.host=192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["generate", "-p", "x", "--temperature", "-1"], "--temperature"),
        (["generate", "-p", "x", "--top-p", "0"], "--top-p"),
        (["generate", "-p", "x", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "-p", "x", "--temperature", "nan"], "nan is not a finite number"),
        (["generate", "-p", "x", "--repetition-penalty", "0"], "--repetition-penalty"),
        (["generate", "-p", "x", "--repetition-penalty", "inf"], "inf is not a finite number"),
        (["generate", "-p", "x", "--presence-penalty", "3"], "--presence-penalty"),
        (["generate", "-p", "x", "--frequency-penalty", "-2.1"], "--frequency-penalty"),
        (["generate", "-p", "x", "--logit-bias", "5"], "expected a token id and a bias"),
        (["generate", "-p", "x", "--logit-bias", "5=nan"], "expected a token id and a bias"),
        (["generate", "-p", "x", "--logit-bias", "5=1", "--logit-bias", "5=2"], "--logit-bias names token 5 twice"),
        (["generate", "-p", "x", "--allowed-tokens", ""], "expected token ids with commas"),
        (["generate", "-p", "x", "--banned-tokens", "1,x"], "expected token ids with commas"),
        (["generate", "-p", "x", "--min-tokens", "9", "--max-tokens", "8"], "--min-tokens 9 is above --max-tokens 8"),
        (["generate", "-p", "x", "--logprobs", "21", "--json"], "--logprobs"),
        (["generate", "-p", "x", "--logprobs", "2"], "give --json too"),
        (["generate", "-p", "x", "--n", "0"], "--n"),
        (["generate", "-p", "x", "--mode", "fast"], "--mode"),
        (["generate", "-p", "x", "--connect", "tcp://127.0.0.1:9", "--trace", "t.json"], "--trace is the engine's own"),
        (["generate", "-p", "x", "--trace", "/nope/t.json"], "cannot write /nope/t.json"),
        (["generate", "-p", "x", "--connect", "127.0.0.1:9"], "no engine answers at 127.0.0.1:9 (Connection refused)"),
        (["generate", "-p", "x", "--connect", "nonsense"], "'nonsense' is not an address"),
        (["bench", "--modes", "ar,fast"], "unknown mode 'fast'"),
        (["bench", "--lookahead", "ssd=x"], "expected MODE=K"),
        (["bench", "--prompts", "/nope.jsonl"], "cannot read prompts /nope.jsonl"),
        (["bench", "--json", "/nope/out.json"], "cannot write /nope/out.json"),
        (["bench", "--drafts", "1,0"], "--drafts '1,0': expected numbers of drafts above 0"),
        (["bench", "--drafts", "2", "--modes", "ar"], "have sd or ssd among --modes"),
        (["bench", "--drafts", "2", "--numerics", "fast"], "compare one of them at a time"),
        (["bench", "--drafts", "2", "--connect", "tcp://127.0.0.1:9"], "--drafts is the engine's own"),
        (["bench", "--random", "llama-9b"], "did you mean random:llama-8b?"),
        (["bench", "--random", "tiny,tinny"], "did you mean random:tiny?"),
        (["bench", "--random", "tiny", "--connect", "tcp://127.0.0.1:9"], "--random is the engine's own"),
        (["bench", "--agreement", "0.5"], "--agreement is of the models of --random"),
        (["bench", "--set", "target.model=random:tiny@0.5"], "its text is the script; give an agreement to the draft"),
        (["study", "--out", "x", *RANDOM], "random:tiny says scripted text; a study needs real text"),
        (["bench", "--divide-budget"], "--divide-budget says how the drafts of --drafts share"),
        (["fetch", "nope"], "no embedded model 'nope'"),
        (["nope"], "No such command"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], fetched: None, arguments: list[str], message: str
) -> None:
    assert message in fails(capsys, arguments)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model seems to be there; other paths are looked at for real."""
    real = preflight.inspect_model
    monkeypatch.setattr(preflight, "inspect_model", lambda path: real(path) if path != "/" else None)
    monkeypatch.setattr("ssd_runtime.model.files.catalogue.CATALOGUE", _embedded_is_here())


def _embedded_is_here() -> dict:
    from dataclasses import replace

    from ssd_runtime.model.files.catalogue import CATALOGUE

    return {name: replace(model, file="/") for name, model in CATALOGUE.items()}


def test_a_model_that_was_not_fetched_names_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSD_CACHE", str(tmp_path))
    assert "run `ssd fetch smollm2-135m-instruct`" in fails(capsys, ["generate", "-p", "x"])


def test_a_cache_below_no_home_names_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSD_CACHE", "~no-such-user/models")
    assert "no such home directory; set SSD_CACHE" in fails(capsys, ["generate", "-p", "x"])


def test_a_damaged_model_file_is_one_clear_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 20)
    models = ["--set", f"target.model={path}", "--set", f"draft.model={path}"]
    assert str(path) in fails(capsys, ["generate", "-p", "x", *models])


def test_vocabularies_that_differ_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        def __init__(self, reason: str | None) -> None:
            self.vocabulary = self
            self.reason = reason

        def difference(self, other: object) -> str | None:
            return self.reason

    monkeypatch.setattr(preflight, "inspect", lambda config: (Card("token 7 is 'a' and 'b'"), Card(None)))
    with pytest.raises(ConfigError, match="do not fit: token 7 is 'a' and 'b'"):
        preflight.check_engine(Config())


def test_a_port_in_use_is_refused_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = fails(capsys, ["up", "--set", f"serve.port={port}"])
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; set serve.port" in line


def test_the_engine_is_started_deep_and_wide_enough_for_every_run() -> None:
    runs = plan_runs(["ar", "sd", "ssd"], ["ssd=3,7"], 4)
    assert overrides_for(runs, Config()) == ["speculation.lookahead=7"]
    assert overrides_for(plan_runs(["ar"], [], 4), Config()) == ["speculation.mode=ar"]


COMMANDS = (
    ["generate", "-p", "x"],
    ["bench"],
    ["up"],
    ["doctor"],
    ["fetch"],
    ["slurm", "render"],
    ["study", "--out", "."],
)
MISTAKES = (
    *([*command, "--set", "speculation.lokahead=3"] for command in COMMANDS),
    *([*command, "--config", "/nope.toml"] for command in COMMANDS),
    *([*command, "--set", "target.model=/nope"] for command in COMMANDS[:3]),
    ["generate", "-p", ""],
    ["generate", "-p", "x"],  # the default models, in an empty cache
    ["generate", "-p", "x", "--set", "serve.host=192.0.2.1"],
    ["generate", "-p", "x", "--set", "target.cores=[4095]"],
    ["bench", "--modes", "fast"],
    ["up", "--role", "draft"],
    ["study", "--out", ".", "--figures", "7"],
)


def test_every_command_is_asked_for_a_mistake() -> None:
    assert {command[0] for command in COMMANDS} == set(cli.ssd.commands)


def test_help_and_mistakes_are_answered_without_torch(tmp_path: Path) -> None:
    """Importing torch takes seconds, and whoever mistyped a key is not to wait for them."""
    code = """
import json, sys
from launcher.cli import main
for arguments in json.loads(sys.argv[1]):
    code = main(arguments)
    assert code == 2 * (arguments != ["--help"]), (arguments, code)
    assert "torch" not in sys.modules, arguments
"""
    lines = run_apart(code, [["--help"], *MISTAKES], tmp_path)
    assert len(lines) == len(MISTAKES)
    assert all(line.startswith("ssd: error: ") for line in lines)
    assert sum("did you mean 'lookahead'" in line for line in lines) == len(COMMANDS)


STARTS = (
    ["generate", "-p", "x"],
    ["generate", "-p", "x", "--raw", "--logit-bias", "5=1", "--set", "target.tensor_parallel=2"],
    ["generate", "-p", "x", "--mode", "ar"],
    ["bench", "--limit", "1", "--modes", "ar,ssd"],
    ["up"],
    ["up", "--role", "draft", "--target", "127.0.0.1:9"],
)


def test_ranks_are_started_without_torch(tmp_path: Path) -> None:
    """The ranks import it; a launcher that did so too, before them, would make everybody wait twice."""
    code = """
import json, sys
from launcher import cli, torchrun
from ssd_runtime.errors import SsdError
def start(ranks):
    assert "torch" not in sys.modules, ranks.launch
    raise SsdError("ready to start")
torchrun.Ranks.start = start
for arguments in json.loads(sys.argv[1]):
    cli.main(arguments)
"""
    target = write_hf(tmp_path / "target")
    draft = gguf_file(tmp_path / "draft.gguf")
    models = ["--set", f"target.model={target}", "--set", f"draft.model={draft}", "--set", "serve.port=0"]
    lines = run_apart(code, [[*arguments, *models] for arguments in STARTS], tmp_path)
    assert lines == ["ssd: error: ready to start"] * len(STARTS)


def run_apart(code: str, asked: Sequence[Sequence[str]], cache: Path) -> list[str]:
    """Run `code` in a fresh interpreter without fetched models; returns the lines of its standard error."""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asked)],
        cwd=cache,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "SSD_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize("ignored", [True, False])
def test_a_closed_terminal_interrupts_unless_nohup_said_otherwise(ignored: bool) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        cli.main(["--version"])
        assert (signal.getsignal(signal.SIGHUP) is signal.SIG_IGN) == ignored
        if not ignored:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_openmp_binds_no_process_of_ours_whatever_the_environment_says(monkeypatch, capsys) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    cli.main(["slurm", "--help"])
    assert "OMP_PROC_BIND" not in os.environ
    assert capsys.readouterr().err.count(about_binding(["OMP_PROC_BIND=true"])) == 1
