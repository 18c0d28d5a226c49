"""The entry point of a rank whose leader writes down which of our files a round runs, in the order of their first call.

Used by test_walk.py. One line of JSON a turn of the leader's loop that has sequences to decode.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from launcher import worker

WALK = "SSD_TEST_WALK"  # environment variable: the file of walks
ROOT = Path(worker.__file__).parents[1]
OURS = tuple(str(ROOT / package) for package in ("ssd_runtime", "cuda_ext", "launcher"))


def watch() -> None:
    from ssd_runtime.leader.leader import Leader

    read_mail = Leader._read_mail
    lines = open(os.environ[WALK], "w", buffering=1)  # noqa: SIM115 (for the life of the rank)
    files: dict[str, None] = {}

    def called(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            files.setdefault(frame.f_code.co_filename)

    def next_turn(leader: Leader) -> None:
        sys.setprofile(None)
        if files:
            lines.write(json.dumps([str(Path(file).relative_to(ROOT)) for file in files]) + "\n")
            files.clear()
        if leader._engine.has_work:
            sys.setprofile(called)
        read_mail(leader)

    Leader._read_mail = next_turn  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        watch()
    worker.main()
