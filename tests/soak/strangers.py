"""Strangers at every port of a running engine, while a stream goes on whose tokens are checked.

    python -m tests.soak.strangers --connections 10000

At each port of each process so many come and leave at once, so many talk nonsense and leave, and some stay. Ends with a
table; the exit code is 1 if a process keeps descriptors, a token was wrong or lost, or the draft is not linked.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.soak.engine import Engine

AT_ONCE = 200  # connections of one visitor
ANSWER_MS = 50  # what a port that hears takes at most to accept on one machine
STAYING = 100  # at each port


def listening(pid: int) -> list[tuple[str, int]]:
    """Where a process listens."""
    found = psutil.Process(pid).net_connections("tcp")
    return [(one.laddr.ip, one.laddr.port) for one in found if one.status == psutil.CONN_LISTEN]


def visit(host: str, port: int, count: int, said: bytes = b"") -> int:
    """Come `count` times, say something and leave at once; returns how many were let in."""
    came = 0
    while came < count:
        with coming(host, port, min(AT_ONCE, count - came)) as visitors:
            for one in visitors:
                with contextlib.suppress(OSError):
                    one.send(said) if said else None
        if not visitors:
            break
        came += len(visitors)
    return came


@contextlib.contextmanager
def coming(host: str, port: int, count: int) -> Iterator[list[socket.socket]]:
    """Come `count` times and stay for the block; yields those who were let in."""
    with contextlib.ExitStack() as all_of_them:
        waiting: dict[int, socket.socket] = {}
        poll = select.poll()
        for _ in range(count):
            one = all_of_them.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            one.setblocking(False)
            one.connect_ex((host, port))
            waiting[one.fileno()] = one
            poll.register(one, select.POLLOUT)
        let_in: list[socket.socket] = []
        while waiting and (ready := poll.poll(ANSWER_MS)):
            for fd, event in ready:
                poll.unregister(fd)
                one = waiting.pop(fd)
                if not event & (select.POLLERR | select.POLLHUP):
                    let_in.append(one)
        yield let_in


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ssd-strangers-") as directory, Engine(Path(directory)) as engine:
        engine.begin(1)
        kept = besiege([engine.target.process.pid, engine.draft.process.pid], options.connections)
        linked = engine.status().draft == "linked"
        report = engine.end()
    print(f"answers: {report.answers}, {report.wrong} wrong, {report.failed} lost; the draft is linked: {linked}")
    well = kept <= 0 and linked and report.answers > 0 and not report.wrong and not report.failed
    print("KEPT" if well else "BROKEN: a promise in the table above was not kept")
    return 0 if well else 1


def listeners(launchers: list[int]) -> list[psutil.Process]:
    """Processes under these, themselves included, that listen somewhere."""
    return [child for pid in launchers for child in family(pid) if listening(child.pid)]


def besiege(launchers: list[int], count: int) -> int:
    """Visit every port under some processes; prints a row for each port, returns the descriptors that were kept."""
    processes = listeners(launchers)
    before = {process.pid: process.num_fds() for process in processes}
    print(f"{'process':<12} {'port':<24} {'came':>7} {'talked':>7} {'stayed':>7} {'descriptors':>24}")
    for process in processes:
        for host, port in listening(process.pid):
            start = process.num_fds()
            came = visit(host, port, count)
            talked = visit(host, port, count, os.urandom(256))
            with coming(host, port, STAYING) as stayed:
                time.sleep(0.1)
                most = process.num_fds()
            end = settled(process, before[process.pid])
            row = f"{process.name()[:12]:<12} {host + ' ' + str(port):<24} {came:>7} {talked:>7} {len(stayed):>7}"
            print(f"{row} {f'{start}, at most {most}, {end}':>24}", flush=True)
    return sum(settled(process, before[process.pid]) - before[process.pid] for process in processes)


def family(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def settled(process: psutil.Process, expected: int, within_s: float = 5.0) -> int:
    """A process's descriptors, once they are as many as expected or some seconds have gone by."""
    deadline = time.monotonic() + within_s
    while process.num_fds() > expected and time.monotonic() < deadline:
        time.sleep(0.05)
    return process.num_fds()


if __name__ == "__main__":
    sys.exit(main())
