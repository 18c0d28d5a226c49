"""An engine listens where it was told and nowhere else, by IPv4 and IPv6, and strangers at its ports change nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterable

import psutil
import pytest

from tests.process.conftest import Start
from tests.process.runs import Run, error_line
from tests.soak.strangers import besiege, listeners, listening

pytestmark = pytest.mark.process
ASK = ("--prompt", "the quick brown fox", "--max-tokens", "40", "--temperature", "0.8", "--seed", "3")


def is_rank(process: psutil.Process) -> bool:
    return "RANK" in process.environ()


def hosts(processes: Iterable[psutil.Process]) -> set[str]:
    return {host for process in processes for host, _ in listening(process.pid)}


def address(run: Run) -> str:
    return run.until("address: ")


def text(ssd: Start, where: str, mode: str) -> str:
    asked = ssd("generate", "--connect", where, "--mode", mode, *ASK)
    assert asked.exit_code(60) == 0, asked.err
    return asked.out


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_a_world_listens_where_it_was_told_and_nowhere_else(ssd: Start) -> None:
    up = ssd("up", "--set", 'serve.host="127.0.0.2"')
    assert address(up).startswith("tcp://127.0.0.2:")
    processes = listeners([up.process.pid])
    assert hosts([up.rank(0)]) == {"127.0.0.2"}
    assert hosts([up.rank(1)]) == {"127.0.0.1"}  # from where the way leads there
    assert hosts(process for process in processes if not is_rank(process)) == {"127.0.0.1"}  # what starts them


def test_two_groups_over_ipv6_draft_and_do_not_mind_strangers(ssd: Start, capsys: pytest.CaptureFixture[str]) -> None:
    target = ssd("up", "--role", "target", "--set", 'serve.host="[::1]"')
    if not has_ipv6():  # then it is refused before anything starts
        assert target.exit_code() == 2
        assert "cannot listen on [::1]:0" in error_line(target.err)
        return
    where = address(target)
    assert where.startswith("tcp://[::1]:")
    draft = ssd("up", "--role", "draft", "--target", where)
    draft.until("linked: ")
    ranks = [one for one in listeners([target.process.pid, draft.process.pid]) if is_rank(one)]
    assert len(ranks) == 2
    assert hosts(ranks) == {"::1"}
    plain = text(ssd, where, "ar")
    assert besiege([target.process.pid, draft.process.pid], 150) <= 0, capsys.readouterr().out
    assert text(ssd, where, "ssd") == plain
    assert not draft.ended
    assert "lost" not in target.err + draft.err


@pytest.mark.parametrize(("verb", "option"), [("generate", "--connect"), ("up", "--target")])
def test_an_ipv6_address_without_brackets_is_refused_by_name(ssd: Start, verb: str, option: str) -> None:
    arguments = ("--prompt", "x") if verb == "generate" else ("--role", "draft")
    run = ssd(verb, *arguments, option, "::1:7333")
    assert run.exit_code() == 2
    line = error_line(run.err)
    assert "'::1:7333' is not an address; an IPv6 address needs brackets: [HOST]:PORT" in line
