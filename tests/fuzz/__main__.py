"""Fuzzing: valid messages and frames are damaged, decoded, and given to those who read them.

    python -m tests.fuzz --messages 1000000 --frames 1000000 --seed 0

Everything must come out as a message or frame within its bounds or as a ProtocolError, and whoever gets what came
through must go on. Ends with a table; the exit code is 1 if anything crashed or hung.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

from ssd_runtime.comm.control.codec import ANSWERED, decode, encode
from ssd_runtime.comm.control.messages import MESSAGE_TYPES, Message
from ssd_runtime.comm.link.frames import OutcomeCodec, TreeCodec
from ssd_runtime.comm.protocol import ProtocolError
from ssd_runtime.model.text.tokenizer import Tokenizer
from tests.fuzz.consumers import PLAUSIBLE, SHAPE, Draft, Front, Target, decoded
from tests.fuzz.mutations import mutated_message, mutated_words, value_of
from tests.tiny_models import write_hf
from tests.wire import check

HANG_S = 20.0
BATCH = 16  # messages that a leader gets at once
EVERY = 20  # of what is decoded, so much is given to the slow ones among those who read it
LIES = 2000  # trees between two engines beside a liar


class Hang(BaseException):
    """A case took too long. No Exception, so that nothing swallows it."""


class Findings:
    """What went wrong, and how much went through."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.crashes: Counter[str] = Counter()

    @contextlib.contextmanager
    def case(self, case: object) -> Iterator[None]:
        """Count what escapes from within; the first of each kind is shown whole."""
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
        try:
            yield
        except (Exception, Hang) as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:100]}"
            if not self.crashes[kind]:
                traceback.print_exc()
                print(f"with {str(case)[:2000]}\n", file=sys.stderr)
            self.crashes[kind] += 1
            self.counts["hangs" if isinstance(error, Hang) else "crashes"] += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def fuzz_messages(count: int, chance: random.Random, findings: Findings, tokenizer: Tokenizer) -> None:
    """Damage, decode, check every field; a sample goes to a leader."""
    kinds = list(MESSAGE_TYPES.values())
    corpus = [encode(value_of(kinds[i % len(kinds)], chance)) for i in range(40 * len(kinds))]
    corpus += [encode(one) for one in PLAUSIBLE] * 120
    front, batch = Front(tokenizer), list[Message]()
    for number in range(count):
        data = mutated_message(corpus, chance)
        findings.counts["messages"] += 1
        with findings.case(data):
            message = _read(data)
            if message is None:
                continue
            findings.counts["messages within bounds"] += 1
            check(message, type(message))
            if number % EVERY == 0:
                batch.append(message)
        if len(batch) == BATCH:
            findings.counts["messages to a leader"] += BATCH
            before = sum(findings.crashes.values())
            with findings.case(batch):
                front.take(batch)
            if sum(findings.crashes.values()) > before:
                front = Front(tokenizer)
            batch = []


def _read(data: bytes) -> Message | None:
    try:
        return decode(data, ANSWERED)
    except ProtocolError as error:
        reason = str(error)
    assert len(reason) < 400, "an error shows a few characters of what a stranger sent"
    return None


def fuzz_frames(count: int, chance: random.Random, findings: Findings) -> None:
    """Damage, decode, check every field; a sample goes to a draft, to a cache and to an engine beside a liar."""
    outcomes, trees = OutcomeCodec(SHAPE), TreeCodec(SHAPE)
    draft, target = Draft(), Target()
    draft.begin()
    outcome_words, tree_words = outcomes.encode(draft.frame(chance)), trees.encode(target.frame(chance))
    for number in range(count // 2):
        findings.counts["frames"] += 2
        if number % EVERY == 0:
            tree_words = trees.encode(target.frame(chance))
        slow = number % 8 == 0
        if slow:
            outcome_words = outcomes.encode(draft.frame(chance))
        words = mutated_words(outcome_words, chance)
        with findings.case(words.tolist()):
            frame = decoded(outcomes, words)
            if frame is not None:
                findings.counts["frames within bounds"] += 1
                check(frame, type(frame))
                if slow:
                    findings.counts["frames to a draft"] += 1
                    try:
                        draft.take(frame)
                    except BaseException:
                        draft = Draft()
                        draft.begin()
                        raise
        words = mutated_words(tree_words, chance)
        with findings.case(words.tolist()):
            tree = decoded(trees, words)
            if tree is not None:
                findings.counts["frames within bounds"] += 1
                findings.counts["frames to a target"] += 1
                check(tree, type(tree))
                target.take(tree)
        if number % LIES == LIES - 1:
            findings.counts["engines beside a liar"] += 1
            with findings.case("an engine beside a liar"):
                target.decode_beside_lies()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _hang)
    findings, begin = Findings(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer.from_model(write_hf(Path(folder) / "tiny"))
        fuzz_messages(options.messages, random.Random(options.seed), findings, tokenizer)
    fuzz_frames(options.frames, random.Random(options.seed + 1), findings)
    for name, count in findings.counts.items():
        print(f"{name:26} {count}")
    print(f"{'seconds':26} {time.monotonic() - begin:.0f}")
    for kind, count in findings.crashes.most_common():
        print(f"{count} x {kind}")
    print("CRASHED" if findings.crashes else "NOTHING CRASHED OR HUNG")
    return 1 if findings.crashes else 0


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang(f"more than {HANG_S:g} s")


if __name__ == "__main__":
    sys.exit(main())
