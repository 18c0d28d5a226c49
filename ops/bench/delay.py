"""What a slow wire costs: tokens/s of one engine over two hosts, with and without a delay added each way.

Starts one world over two network namespaces (target on one, draft on the other) that a relay joins, and answers every
prompt with and without the delay, one right after the other, the order changing from prompt to prompt. A hit costs no
round trip, so SSD should hardly feel it; SD waits for its draft every round. Needs root, ip and TUN; run from the
repository's directory:

    python -m ops.bench.delay [--config X] [--delay-ms 1] [--modes ar,sd,ssd] [--limit 3] [--repeat 3] [--at-least 0.95]

Exit codes: 0 done, 1 tokens differ or SSD kept less than --at-least, 2 no hosts can be made here.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from launcher.bench.prompts import Prompt, read_prompts
from launcher.generation import Generation, generate
from launcher.summary import Summary, summarise
from ssd_runtime.comm.control.client_messages import ChatMessage, Generate
from ssd_runtime.engine.client import Client
from ssd_runtime.host import topology
from tests.cluster.hosts import Lab, Relay, joined_by_a_relay, reason_for_none
from tests.cluster.runs import client_on, cores_apart
from tests.process.runs import SSD, Run

RENDEZVOUS = "10.77.0.1:29500"
READY_S = 600.0


@dataclass(frozen=True)
class Plan:
    """What is measured: every prompt, so often, in these modes, with and without `delay_s` each way."""

    prompts: list[Prompt]
    modes: list[str]
    delay_s: float
    repeat: int
    max_tokens: int


class Row(Struct, frozen=True):
    """One mode without and with the delay, and the share of its tokens/s that it kept."""

    mode: str
    plain: Summary
    late: Summary
    kept: float


class Report(Struct, frozen=True):
    """All modes, and whether all tokens were the same."""

    delay_ms: float
    runs: tuple[Row, ...]
    identical: bool


def measure(client: Client, wire: Relay, plan: Plan) -> Report:
    """Tokens/s of each mode with and without the delay, and whether all tokens were the same."""
    found: dict[tuple[str, bool], list[Generation]] = {
        (mode, late): [] for mode in plan.modes for late in (False, True)
    }
    answers: dict[str, set[tuple[int, ...]]] = {}
    for mode in plan.modes:  # warm-up
        ask(client, plan.prompts[0], mode, 16)
    for turn in range(plan.repeat):
        for number, prompt in enumerate(plan.prompts):
            for mode in plan.modes:
                for late in (False, True) if (turn + number) % 2 else (True, False):
                    wire.delay(plan.delay_s if late else 0.0)
                    generation = ask(client, prompt, mode, plan.max_tokens)
                    found[mode, late].append(generation)
                    answers.setdefault(prompt.id, set()).add(generation.token_ids)
    rows = []
    for mode in plan.modes:
        plain, late = (summarise([one.finished for one in found[mode, late]]) for late in (False, True))
        rows.append(Row(mode, plain, late, (late.tokens_per_second or 0.0) / (plain.tokens_per_second or math.nan)))
    return Report(plan.delay_s * 1e3, tuple(rows), all(len(seen) == 1 for seen in answers.values()))


def ask(client: Client, prompt: Prompt, mode: str, max_tokens: int) -> Generation:
    messages = (ChatMessage("user", prompt.prompt),)
    request = Generate(f"{mode} {prompt.id}", messages=messages, mode=mode, max_tokens=max_tokens)  # type: ignore[arg-type]
    return generate(client, request)


@contextmanager
def engine(lab: Lab, config: Path | None, overrides: list[str]) -> Iterator[Client]:
    """One world over both hosts, and a client at the leader's side of the wire."""
    arguments = ["--nnodes", "2", "--rendezvous", RENDEZVOUS, *cores_apart(topology.allowed_cores())]
    arguments += [part for override in overrides for part in ("--set", override)]
    arguments += [] if config is None else ["--config", str(config.resolve())]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ssd-delay-")))
        nodes = []
        for rank, host in enumerate(lab.hosts):
            command = host.command(*SSD, "up", "--node-rank", str(rank), *arguments)
            nodes.append(Run(directory / f"node{rank}", command, variables={}))
            stack.callback(nodes[-1].kill)
        address = nodes[0].until("address: ", READY_S)
        yield stack.enter_context(client_on(lab.hosts[0], address, READY_S))


def show(report: Report) -> None:
    print(f"{report.delay_ms:g} ms added each way; tokens/s without, with, kept; hit rate without, with")
    for row in report.runs:
        plain, late = row.plain, row.late
        hits = "" if plain.hit_rate is None else f"   {plain.hit_rate:.3f} {late.hit_rate or 0.0:.3f}"
        print(
            f"{row.mode:>12} {plain.tokens_per_second or 0.0:9.2f} {late.tokens_per_second or 0.0:9.2f} "
            f"{100 * row.kept:7.1f} %{hits}"
        )
    print("all tokens identical" if report.identical else "TOKENS DIFFER")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--limit", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--delay-ms", type=float, default=1.0)
    parser.add_argument("--modes", default="ar,sd,ssd")
    parser.add_argument("--at-least", type=float, help="share of its tokens/s that SSD must keep")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if reason := reason_for_none():
        print(f"no hosts can be made here: {reason}", file=sys.stderr)
        return 2
    prompts = read_prompts(given.prompts, given.limit)
    plan = Plan(prompts, given.modes.split(","), given.delay_ms / 1e3, given.repeat, given.max_tokens)
    with joined_by_a_relay() as lab, engine(lab, given.config, given.overrides) as client:
        assert lab.relay is not None
        report = measure(client, lab.relay, plan)
    show(report)
    if given.json:
        given.json.write_text(json.dumps(msgspec.to_builtins(report), indent=1) + "\n")
    kept = {row.mode: row.kept for row in report.runs}
    return 0 if report.identical and kept.get("ssd", 1.0) >= (given.at_least or 0.0) else 1


if __name__ == "__main__":
    sys.exit(main())
