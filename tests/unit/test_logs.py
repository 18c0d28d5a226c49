"""How a line looks and who is asked for the level."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from ssd_runtime import logs
from ssd_runtime.errors import ConfigError


@pytest.fixture(autouse=True)
def _root_logger_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []  # setup() closes what it replaces
    yield
    root.handlers, root.level = handlers, level


def test_a_line_says_when_who_and_what(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SSD_LOG", "info")
    logs.setup("target", 0)
    logging.getLogger("any").info("round %d", 7)
    logging.getLogger("any").debug("not shown")
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} target 0 \| round 7\n", capsys.readouterr().err)


def test_a_process_without_a_rank_shows_its_role_only(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("launcher")
    logging.getLogger("any").warning("hm")
    assert capsys.readouterr().err.endswith(" launcher | hm\n")


def test_an_unknown_level_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSD_LOG", "loud")
    with pytest.raises(ConfigError, match="debug, info, warning, error"):
        logs.setup("target", 0)
