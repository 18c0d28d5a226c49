"""What a miss costs the others of its batch: tokens/s of the rows that hit, with and without one forced miss a round.

Starts one engine (a target and a draft, each a process) whose leader can be told to forget the branches of one sequence
every round (ops/bench/forgetful_rank.py), and answers the same requests at once with and without that, in turns. What
counts are the rounds in which all of them are decoded. Run from the repository's directory:

    python -m ops.bench.misses [--config X] [--set ...] [--batch 8] [--repeat 4] [--max-tokens 160] [--at-least 0.95]

Unless --set says otherwise, speculation.adapt is false: a planner that shares one engine with both would answer the
forced misses by speculating less. Exit codes: 0 done, 1 tokens differ or less than --at-least was kept, 2 bad input.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import msgspec
from msgspec import Struct

from launcher import preflight, screen, session
from launcher.bench.prompts import Prompt, read_prompts
from launcher.generation import Generates, generate_together
from launcher.torchrun import Launch, Ranks
from ops.bench.forgetful_rank import BATCH, FORCED, ROUNDS
from ssd_runtime.comm.control.client_messages import ChatMessage, Generate
from ssd_runtime.config import load_config
from ssd_runtime.errors import ConfigError, SsdError
from ssd_runtime.speculation.types import SamplingParams

CLEAN = "clean"
ARMS = (CLEAN, FORCED)
WARM_UP_TOKENS = 16


class RecordedRound(Struct, frozen=True):
    """One verification of a batch, as the leader wrote it down.

    Attributes:
        run: which batch, "arm:repeat".
        begun: seconds, when its speculations were asked for.
        victim: the row whose branches were dropped; None for nobody.
        hits, tokens: of each row.
    """

    run: str
    begun: float
    victim: int | None
    hits: tuple[bool, ...]
    tokens: tuple[int, ...]


class Rates(Struct, frozen=True):
    """Over some rounds: tokens/s of one row that hit, of one row that was not forced to miss, of all rows together."""

    rounds: int
    hits: float  # a round
    round_ms: float
    hitting_row: float
    spared_row: float
    batch: float


class Report(Struct, frozen=True):
    """Both arms, and the share of their tokens/s that rows that hit keep: over all repeats, and of each."""

    batch: int
    clean: Rates
    forced: Rates
    kept: float
    kept_by_repeat: tuple[float, ...]
    identical: bool


def rates(rounds: Sequence[RecordedRound], size: int) -> Rates:
    """Of the rounds with `size` rows that another such round of the same run follows: only these have an end.

    Raises:
        ConfigError: there is none, or nothing hit.
    """
    timed = [
        (one, following.begun - one.begun)
        for one, following in itertools.pairwise(rounds)
        if one.run == following.run and len(one.hits) == len(following.hits) == size
    ]
    spared = [(one, row, lasted) for one, lasted in timed for row in range(size) if row != one.victim]
    hitting = [(one, row, lasted) for one, row, lasted in spared if one.hits[row]]
    if not hitting:
        raise ConfigError(f"no round in which all {size} were decoded and one hit: ask for more --max-tokens")
    seconds = sum(lasted for _, lasted in timed)
    return Rates(
        rounds=len(timed),
        hits=sum(sum(one.hits) for one, _ in timed) / len(timed),
        round_ms=1e3 * seconds / len(timed),
        hitting_row=_speed(hitting),
        spared_row=_speed(spared),
        batch=sum(sum(one.tokens) for one, _ in timed) / seconds,
    )


def _speed(rows: Sequence[tuple[RecordedRound, int, float]]) -> float:
    """tokens/s of (round, row, seconds)."""
    return sum(one.tokens[row] for one, row, _ in rows) / sum(lasted for _, _, lasted in rows)


def report(rounds: Sequence[RecordedRound], size: int, answers: dict[str, set[tuple[int, ...]]]) -> Report:
    """Rates with and without the forced miss, what is kept of them, over all and repeat by repeat."""
    clean, forced = (rates([one for one in rounds if one.run.startswith(f"{arm}:")], size) for arm in ARMS)
    each = []
    for repeat in sorted({one.run.partition(":")[2] for one in rounds}, key=int):
        without, with_it = (rates([one for one in rounds if one.run == f"{arm}:{repeat}"], size) for arm in ARMS)
        each.append(with_it.hitting_row / without.hitting_row)
    identical = all(len(seen) == 1 for seen in answers.values())
    return Report(size, clean, forced, forced.hitting_row / clean.hitting_row, tuple(each), identical)


def measure(
    client: Generates, prompts: Sequence[Prompt], repeat: int, max_tokens: int
) -> dict[str, set[tuple[int, ...]]]:
    """All prompts at once, with and without forced misses in turns; every answer to each prompt, AR's included."""
    answers: dict[str, set[tuple[int, ...]]] = {}

    def ask(run: str, mode: str, length: int) -> None:
        requests = [
            Generate(
                f"{run}:{number}",
                messages=(ChatMessage("user", prompt.prompt),),
                params=SamplingParams(),
                max_tokens=length,
                mode=mode,  # type: ignore[arg-type]
                ignore_eos=True,
                stream=False,
            )
            for number, prompt in enumerate(prompts)
        ]
        for request, generation in zip(requests, generate_together(client, requests), strict=True):
            if length == max_tokens:
                answers.setdefault(request.request_id.rpartition(":")[2], set()).add(generation.token_ids)

    for arm in ARMS:
        ask(f"{arm}:warm", "ssd", min(WARM_UP_TOKENS, max_tokens - 1))
    for turn in range(repeat):
        for arm in ARMS if turn % 2 else ARMS[::-1]:
            ask(f"{arm}:{turn}", "ssd", max_tokens)
    ask("ar:0", "ar", max_tokens)
    return answers


class ForgetfulRanks(Ranks):
    """Ranks that begin in `ops.bench.forgetful_rank`."""

    def command(self) -> list[str]:
        return ["ops.bench.forgetful_rank" if part == "launcher.worker" else part for part in super().command()]


@contextmanager
def engine(config: Path | None, overrides: tuple[str, ...]) -> Iterator[tuple[Generates, Path]]:
    """A client of the engine, and the file into which its leader writes rounds."""
    launch = Launch(load_config(config, overrides))
    preflight.check_engine(launch.config)
    with tempfile.TemporaryDirectory(prefix="ssd-misses-") as directory:
        rounds = Path(directory) / "rounds.jsonl"
        with (
            mock.patch.dict(os.environ, {ROUNDS: str(rounds), BATCH: str(launch.config.engine.max_num_seqs)}),
            mock.patch.object(session, "Ranks", ForgetfulRanks),
            session.started(launch, screen.loading) as found,
        ):
            yield found.client, rounds


def read_rounds(path: Path) -> list[RecordedRound]:
    """What the leader wrote down, without the warm-up."""
    rounds = [msgspec.json.decode(line, type=RecordedRound) for line in path.read_text().splitlines()]
    return [one for one in rounds if not one.run.endswith(":warm")]


def show(found: Report) -> None:
    print(f"{found.batch} requests at once; tokens/s of one row that hit, of one row not forced to miss, of all")
    for arm, one in zip(ARMS, (found.clean, found.forced), strict=True):
        print(
            f"{arm:>8} {one.hitting_row:9.2f} {one.spared_row:9.2f} {one.batch:9.2f}   "
            f"{one.rounds} rounds of {one.round_ms:.1f} ms, {one.hits:.2f} hits each"
        )
    print(
        f"rows that hit keep {100 * found.kept:.1f} % of their tokens/s; by repeat: "
        + ", ".join(f"{100 * kept:.1f}" for kept in found.kept_by_repeat)
        + f" (median {100 * statistics.median(found.kept_by_repeat):.1f})"
    )
    if 2 * found.clean.hits < found.batch:
        print("few rows hit even without: a smaller lookahead and budget let the draft keep up with so many")
    print("all tokens identical, AR's too" if found.identical else "TOKENS DIFFER")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--at-least", type=float, help="share of their tokens/s that the rows that hit must keep")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    try:
        if given.batch < 2 or given.repeat < 1 or given.max_tokens < 8:
            raise ConfigError("--batch must be at least 2, --repeat 1, --max-tokens 8")
        several = itertools.cycle(read_prompts(given.prompts, given.batch))
        prompts = list(itertools.islice(several, given.batch))
        own = ("speculation.mode=ssd", "speculation.adapt=false")
        overrides = (*own, *given.overrides, f"engine.max_num_seqs={given.batch}")
        with engine(given.config, overrides) as (client, path):
            answers = measure(client, prompts, given.repeat, given.max_tokens)
            found = report(read_rounds(path), given.batch, answers)
    except SsdError as error:
        print(f"misses: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    show(found)
    if given.json:
        given.json.write_text(json.dumps(msgspec.to_builtins(found), indent=1) + "\n")
    return 0 if found.identical and found.kept >= (given.at_least or 0.0) else 1


if __name__ == "__main__":
    sys.exit(main())
