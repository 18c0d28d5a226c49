"""A soak: streams run while drafts are killed, stopped, replaced by liars, and strangers attack every port.

    python -m tests.soak --seconds 600 --faults 50 --seed 1

Two torchrun groups with tiny models. Ends with a table; the exit code is 1 if an answer was wrong or lost, if the
target stalled longer than --stall-ms beyond a round, or if, after the first quarter, its memory grew by more than
--grow-mib, or its threads or open files grew. A stall is the time between two verifications; what the system ran in it
instead of the target, though that could have gone on, is shown and not held against it.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.soak.attacks import ATTACKS
from tests.soak.engine import Engine
from tests.soak.faults import FAULTS

SHOWN = 12  # stalls
SPARE = 4  # threads and open files more at the end than after a quarter: of a link that is being closed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--stall-ms", type=float, default=100.0)
    parser.add_argument("--grow-mib", type=float, default=32.0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    acts = FAULTS | ATTACKS
    names = list(acts)
    plan = [names[i % len(names)] for i in range(options.faults)]
    chance.shuffle(plan)
    done: list[tuple[float, str]] = []
    with tempfile.TemporaryDirectory(prefix="ssd-soak-") as directory, Engine(Path(directory)) as engine:
        engine.begin(options.streams)
        start = time.monotonic()
        sizes = [engine.size()]
        for number, name in enumerate(plan):
            at = start + (number + chance.random()) * options.seconds / len(plan)
            engine.run_until(at)
            done.append((time.monotonic(), name))
            acts[name](engine, chance)
            sizes += engine.sizes_while_linked()
            memory = f"target {engine.size().resident / 2**20:.0f} MiB"
            print(f"{time.monotonic() - start:6.1f} s  {name:<28} {engine.summary()}; {memory}", flush=True)
        engine.run_until(start + options.seconds)
        engine.recover()
        sizes.append(engine.size())
        report = engine.end()
    first = sizes[len(sizes) // 4]
    grown = (sizes[-1].resident - first.resident) / 2**20
    longest = max((stall.milliseconds for stall in report.stalls), default=0.0)
    own = max((stall.milliseconds - stall.delayed for stall in report.stalls), default=0.0)
    rows = {
        "faults": ", ".join(f"{count} x {name}" for name, count in sorted(Counter(plan).items())),
        "answers": f"{report.answers}, {report.wrong} wrong, {report.failed} lost; {report.busy} put again",
        "drafts": f"lost {report.lost} times, linked {report.linked} times",
        "hit rate": f"{report.hits_before:.2f} before the first fault, {report.hits_after:.2f} after the last",
        "outside verification, ms": f"longest {longest:.0f}, of the target's own doing {own:.0f}, "
        f"p50 {report.usual_ms:.1f}",
        "verification, ms": f"p50 {report.verify_ms:.1f}",
        "memory of the target, MiB": f"{first.resident / 2**20:.0f} after a quarter, {grown:+.1f} at the end",
        "threads": f"{first.threads} after a quarter, {sizes[-1].threads} at the end",
        "open files": f"{first.files} after a quarter, {sizes[-1].files} at the end",
    }
    for name, value in rows.items():
        print(f"{name:<28} {value}")
    for stall in report.stalls[:SHOWN]:
        _, fault = max((one for one in done if one[0] <= stall.at), default=(0.0, "the first fault was still to come"))
        print(f"{stall.at - start:6.1f} s  {fault:<28} {stall}")
    kept = not report.wrong and not report.failed and report.answers > 0
    kept = kept and own - report.usual_ms <= options.stall_ms and grown <= options.grow_mib
    kept = kept and max(sizes[-1].threads - first.threads, sizes[-1].files - first.files) <= SPARE
    print("KEPT" if kept else "BROKEN: a promise in the table above was not kept")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
