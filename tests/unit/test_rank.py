"""What every rank does whatever its role: it leaves when it is asked to, once."""

from __future__ import annotations

import subprocess
import sys

ASKED_TWICE = """
import os, signal
from launcher.ranks.announcer import Announcer
from launcher.ranks.rank import Rank
from ssd_runtime.host import topology
from ssd_runtime.config import load_config

class AskedTwice(Rank):
    def serve(self):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGHUP)
            print("cleaned up")

config = load_config(None, ["speculation.mode=ar"])
place = topology.place(config, {})
AskedTwice(config, place, Announcer(), None).run()
"""


def test_a_second_request_to_leave_does_not_break_what_the_first_began() -> None:
    ended = subprocess.run([sys.executable, "-c", ASKED_TWICE], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "cleaned up\n"), ended.stderr
