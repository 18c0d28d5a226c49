"""Prompt files: the embedded set, and refusals that name the line."""

from pathlib import Path

import pytest

from launcher.bench import prompts
from launcher.bench.prompts import Prompt, read_prompts
from ssd_runtime.errors import ConfigError


def test_the_embedded_set_is_varied_and_its_ids_are_unique() -> None:
    prompts = read_prompts()
    assert len({prompt.id for prompt in prompts}) == len(prompts) >= 10
    assert len({prompt.set for prompt in prompts}) >= 8


def test_a_limit_takes_the_first() -> None:
    assert read_prompts(limit=2) == read_prompts()[:2]


def test_line_separators_inside_a_prompt_do_not_split_it(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "set": "s", "prompt": "one\u2028two"}\n\n{"prompt": "bare"}\n')
    assert read_prompts(path) == [Prompt("a", "s", "one\u2028two"), Prompt("3", "", "bare")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "x"}\nnot json\n', "line 2: not JSON"),
        (b'{"id": 1}\n', "line 1: expected"),
        (b'{"prompt": "  "}\n', "line 1: the prompt is empty"),
        (b'["x"]\n', "line 1: expected"),
        (b"\n\n", "there is no prompt in it"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"prompt": "x"}\n{"a": ' + b"[" * 50_000, "line 2: not JSON"),
        (b'{"prompt": ' + b"9" * 50_000 + b"}", "line 1: expected .* out of range"),
        (b'{"prompt": "\\ud800"}', "line 1: not JSON"),
        (b'{"prompt": "x", "id": [[]]}', "line 1: expected .* got `array`"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_prompts(path)


def test_a_file_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MOST_BYTES", 1 << 16)
    with pytest.raises(ConfigError, match="prompts /dev/zero has more than 65536 bytes"):
        read_prompts("/dev/zero")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_prompts(tmp_path / "none.jsonl")
