"""Environment variables of ours: one that says nonsense is refused by everything that would read it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.ranks import roles
from launcher.ranks.announcer import Announcer
from ssd_runtime import environment
from ssd_runtime.errors import ConfigError

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"SSD_LOG", "SSD_CACHE"}  # logs.py checks the one, any directory may be the other


def test_every_variable_that_is_read_is_checked() -> None:
    files = [path for part in ("ssd_runtime", "launcher", "cuda_ext") for path in (ROOT / part).rglob("*.*")]
    sources = "".join(path.read_text() for path in files if path.suffix in (".py", ".cpp", ".h", ".cu"))
    read = set(re.findall(r'(?:environ(?:\.get)?|getenv)[(\[]"(SSD_\w+)"', sources))
    assert read == {*environment.CHOICES, *ELSEWHERE}


@pytest.mark.parametrize("name", environment.CHOICES)
@pytest.mark.parametrize("value", ["avx521", "false", "2", " 0", "x" * 10_000, "\udcff"])
def test_a_value_that_means_nothing_is_refused_with_those_that_do(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=.* means nothing; use one of .*, or unset it$") as refused:
        environment.check({name: value})
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("name", environment.CHOICES)
def test_what_is_known_or_empty_passes(name: str) -> None:
    for value in ("", *environment.CHOICES[name]):
        environment.check({name: value})
    environment.check({})


def test_a_mistyped_variable_is_refused_by_every_command_and_by_every_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SSD_CPU_LEVEL", "avx521")
    assert main(["doctor"]) == 2
    assert "ssd: error: SSD_CPU_LEVEL='avx521' means nothing; use one of baseline" in capsys.readouterr().err
    assert roles.run(None, (), None, None, Announcer(), None, ()) == 2
    assert "SSD_CPU_LEVEL='avx521' means nothing" in capsys.readouterr().err


def test_a_rank_that_is_no_number_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("RANK", "first")
    assert roles.run(None, (), None, None, Announcer(), None, ()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "environment variable RANK='first' is not a number" in line
