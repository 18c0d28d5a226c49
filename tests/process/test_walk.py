"""The walk of one round: how many files a reader opens who follows the leader through it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.process.conftest import Start
from tests.process.runs import SSD, TORCHRUN, free_port
from tests.process.walked_rank import WALK

pytestmark = pytest.mark.process
MOST_FILES = 25
ROUNDS = 20
OFTEN = 0.05  # of the rounds: what happens more seldom, as when memory has grown, is not of a round


def test_one_round_at_the_leader_crosses_few_files(run: Start, config: Path, tmp_path: Path) -> None:
    walks = tmp_path / "walks.jsonl"
    address = f"127.0.0.1:{free_port()}"
    worker = ["-m", "tests.process.walked_rank", "--config", str(config), "--set", f"serve.port={address[10:]}"]
    planned = ["--set", "speculation.adapt=true"]
    ranks = [*TORCHRUN, "--nnodes", "1", "--nproc-per-node", "2", *worker, *planned]
    run(*ranks, variables={"OMP_NUM_THREADS": "1", WALK: str(walks)}).until("address: ")
    answer = run(*SSD, "generate", "--connect", address, "-p", "the quick brown fox", "--max-tokens", "200")
    assert answer.exit_code(60) == 0, answer.err

    turns = [json.loads(line) for line in walks.read_text().splitlines()]
    middle = turns[len(turns) // 4 : -len(turns) // 4]  # nobody is admitted or ends there
    assert len(middle) > ROUNDS
    rounds = Counter(file for turn in middle for file in turn)
    crossed = [file for file, count in rounds.items() if count >= OFTEN * len(middle)]
    assert any("endpoint.py" in file for file in crossed), "the walk has a link in it"
    assert len(crossed) <= MOST_FILES, "\n".join(crossed)
