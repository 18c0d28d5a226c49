"""What surrounds a command: its streams, arguments, directory and limits. Real processes, which say a plain line."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import preflight
from ssd_runtime.config import load_config
from ssd_runtime.errors import ConfigError
from tests.tiny_models import write_hf

ROOT = Path(__file__).parents[2]
SSD = f"{shlex.quote(sys.executable)} -m launcher.cli"


def said_by(command: str, directory: Path, **variables: str) -> tuple[int, str]:
    """Exit code and standard error of a command line of bash; SSD stands for the command."""
    done = subprocess.run(
        ["bash", "-c", command.replace("SSD", SSD)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SSD_CACHE": str(directory), **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    return done.returncode, done.stderr.decode(errors="surrogateescape")


CASES = {
    "a full disk": ("SSD --help > /dev/full", 74, "standard output: No space left on device"),
    "a full disk, unbuffered": ("PYTHONUNBUFFERED=1 SSD --help > /dev/full", 74, "standard output: No space left on"),
    "nobody reads": ("SSD --help | true; exit ${PIPESTATUS[0]}", 74, "standard output: Broken pipe"),
    "nobody reads tables": ("SSD doctor | true; exit ${PIPESTATUS[0]}", 74, "standard output: Broken pipe"),
    "no standard output": ("SSD --help >&-", 74, "standard output is closed"),
    "no standard input": ("SSD generate -p - <&-", 2, "standard input is closed"),
    "standard input is not UTF-8": (r"printf 'a\xff' | SSD generate -p -", 2, "standard input is not UTF-8: invalid"),
    "standard input without end": ("SSD generate -p - < /dev/zero", 2, "standard input has more than 16777216 bytes"),
    "an argument is not UTF-8": (r"SSD generate -p $'a\xff'", 2, r"argument 'a\udcff' is not UTF-8"),
    "a configuration without end": ("SSD generate -p x --config /dev/zero", 2, "config /dev/zero has more than"),
    "a configuration on a pipe": ("SSD up --config <(echo '[engin]')", 2, "did you mean 'engine'"),
    "the directory is gone": ('cd "$(mktemp -d)" && rmdir "$PWD" && SSD doctor', 2, "the working directory is gone"),
    "a trace into a device": ("SSD generate -p x --trace /dev/full", 2, "cannot write /dev/full: it is no ordinary"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_read_or_written_is_one_line_and_an_exit_code(case: str, tmp_path: Path) -> None:
    command, code, message = CASES[case]
    left, said = said_by(command, tmp_path, PYTHONUNBUFFERED="")
    (line,) = said.splitlines()
    assert left == code
    assert line.startswith("ssd: error: ")
    assert message in line


def test_an_error_that_nobody_can_be_told_still_has_its_exit_code(tmp_path: Path) -> None:
    assert said_by("SSD nope 2> /dev/full", tmp_path) == (2, "")
    assert said_by("SSD nope 2>&-", tmp_path) == (2, "")


def test_without_a_standard_stream_no_file_takes_its_place(tmp_path: Path) -> None:
    """The descriptors 0 to 2 would be given to the next files that are opened, and be written to as output."""
    code = """
import os
from launcher import streams
streams.prepare()
print([os.readlink(f'/proc/self/fd/{number}') for number in (0, 2)])
"""
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} <&- 2>&- >&1 | tee /dev/stderr"
    assert said_by(command, tmp_path) == (0, "['/dev/null', '/dev/null']\n")


def test_a_terminal_of_another_alphabet_is_shown_what_it_can_show(tmp_path: Path) -> None:
    code = "from launcher import streams; streams.prepare(); print('a\\u2192b')"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | tee /dev/stderr"
    assert said_by(command, tmp_path, PYTHONIOENCODING="latin-1", LC_ALL="C") == (0, "a\\u2192b\n")


def test_too_few_open_files_are_refused_and_a_soft_limit_is_raised(tmp_path: Path) -> None:
    model = write_hf(tmp_path / "model")
    up = f"SSD up --set target.model={model} --set draft.model={model} --set serve.host=192.0.2.1"
    code, said = said_by(f"ulimit -n 64; {up}", tmp_path)
    assert (code, said) == (2, "ssd: error: only 64 files may be open here, and ranks need 256: raise ulimit -n\n")
    assert "cannot listen on 192.0.2.1" in said_by(f"ulimit -Sn 64; {up}", tmp_path)[1]


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_pool_beyond_this_hosts_memory_is_refused_by_the_key_to_lower(role: str, tmp_path: Path) -> None:
    model = {"target.model": write_hf(tmp_path / "model"), "draft.model": str(tmp_path / "model")}
    sizes = {"engine.num_blocks": 2**24, "engine.block_size": 128, "draft.dtype": "bf16"}
    other = "draft" if role == "target" else "target"
    set_ = [f"{key}={value}" for key, value in {**model, **sizes, f"{other}.device": "cuda"}.items()]
    config = load_config(None, set_)
    header = preflight.inspect(config)[0]
    preflight.check_memory(config, other, header)  # a GPU's memory is the doctor's to look at
    with pytest.raises(ConfigError, match=rf"KV pool of the {role} needs .* GiB of memory: lower engine\.num_blocks$"):
        preflight.check_memory(config, role, header)


def test_a_host_that_does_not_reach_itself_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("socket.create_connection", refuse)
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1 \(Network is unreachable\), where its ranks meet: ip"):
        preflight.check_host()
