"""The rendered batch scripts on a real Slurm of two hosts."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.slurm import Form, Plan, render
from ssd_runtime.comm.control.client_messages import Chunk, Finished, Generate
from ssd_runtime.config import load_config
from ssd_runtime.host import topology
from tests.cluster import slurm
from tests.cluster.hosts import Host, Lab
from tests.cluster.runs import ask, client_on
from tests.process.runs import PLAIN, ROOT, START_S, TAG, eventually

pytestmark = pytest.mark.process
PROMPT = "the quick brown"
LONG = 400  # tokens: several seconds
MOST_CHUNKS = 20 * LONG


@pytest.fixture
def cluster(cable: Lab) -> Iterator[slurm.Slurm]:
    """Two hosts with a Slurm; jobs inherit what tiny models need."""
    if reason := slurm.reason_for_none():
        pytest.skip(reason)
    tag = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**PLAIN, TAG: tag, "PYTHONPATH": str(ROOT)}.items():
            environment.setenv(name, value)
        # Not below tmp_path: the path of a Unix socket has at most 107 bytes, and those of slurmstepd are long.
        short = tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)
        with short as directory, slurm.running(cable, Path(directory) / "s") as running:
            yield running
    eventually(lambda: not tagged(tag), 10, "no process of Slurm or its jobs is left")


def tagged(tag: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(TAG) == tag and process.pid != os.getpid():
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def ranks_on(host: Host) -> set[str]:
    """The ranks whose processes are on a host."""
    there = os.readlink(host.namespace)
    found = set()
    for process in psutil.process_iter():
        try:
            if "RANK" in process.environ() and os.readlink(f"/proc/{process.pid}/ns/net") == there:
                found.add(process.environ()["RANK"])
        except (psutil.Error, OSError):
            continue
    return found


def write(directory: Path, config: Path, form: Form, *more: str, nodes: int = 1) -> Path:
    """The scripts for the tiny pair, in a directory."""
    cores = topology.allowed_cores()
    overrides = (f"target.cores=[{cores[0]}]", f"draft.cores=[{cores[-1]}]", *more)
    plan = Plan(load_config(config, overrides), config, overrides, form, nodes, time="10", python=sys.executable)
    directory.mkdir()
    for name, text in render(plan).items():
        (directory / name).write_text(text)
    return directory


def await_said(log: Path, pattern: str, cluster: slurm.Slurm) -> str:
    """The first group of `pattern` in a job's log, once it is there."""
    seen: list[str] = []

    def said() -> bool:
        text = log.read_text(errors="replace") if log.exists() else ""
        seen[:] = re.findall(pattern, text)
        return bool(seen)

    try:
        eventually(said, START_S, f"{pattern} in {log.name}")
    except AssertionError as error:
        text = log.read_text(errors="replace") if log.exists() else "(no log)"
        raise AssertionError(f"{error}\n{text}\n{cluster.logs()}") from None
    return seen[0]


def test_one_job_over_two_nodes_serves_and_ends_cleanly_at_its_time_limit(
    cluster: slurm.Slurm, config: Path, tmp_path: Path
) -> None:
    jobs = write(tmp_path / "jobs", config, "single-job", "deployment.drafts=2", nodes=2)
    assert "ranks=(1 2) # of each node" in (jobs / "ssd.sbatch").read_text()
    job = cluster.run("sbatch", "--parsable", str(jobs / "ssd.sbatch"), cwd=jobs)
    log = jobs / f"ssd_{job}.out"
    address = await_said(log, r"address: (tcp://10\.77\.0\.1:\d+)", cluster)
    with client_on(cluster.lab.hosts[1], address) as client:
        plain = ask(client, "ar")
        assert ask(client, "ssd").token_ids == plain.token_ids
        assert client.status().draft == "linked"
    assert [sorted(ranks_on(host)) for host in cluster.lab.hosts] == [["0"], ["1", "2"]]
    assert cluster.job(job)["NodeList"] == "node[1-2]"
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what Slurm does a minute before the limit
    cluster.await_state(job, *slurm.ENDED, timeout_s=30)
    assert cluster.job(job)["JobState"] == "COMPLETED"
    said = log.read_text()
    assert "received SIGUSR1; asking the ranks to leave" in said
    assert "leaving: received SIGTERM" in said


def test_a_draft_job_that_is_requeued_or_replaced_costs_no_token_and_links_again(
    cluster: slurm.Slurm, config: Path, tmp_path: Path
) -> None:
    jobs = write(tmp_path / "jobs", config, "two-jobs")
    submit = ("bash", str(jobs / "ssd-submit.sh"))
    _, target, _, draft = cluster.run(*submit, cwd=jobs).split()
    address = await_said(jobs / f"ssd-target_{target}.out", r"address: (tcp://10\.77\.0\.\d:\d+)", cluster)
    with client_on(cluster.lab.hosts[0], address) as client, client_on(cluster.lab.hosts[1], address) as streaming:
        expected = ask(client, "ar", max_tokens=LONG).token_ids
        eventually(lambda: client.status().draft == "linked", START_S, "the draft job links")

        def loses_its_draft_by(*command: str) -> None:
            """The stream in which a command ends the draft job, and those until its end is felt, are all right."""
            states: list[str] = []
            while "lost" not in states:
                assert len(states) < MOST_CHUNKS, "the draft job goes on"
                got: list[int] = []
                asked = Generate("r", prompt=PROMPT, max_tokens=LONG, ignore_eos=True, mode="ssd")
                for message in streaming.generate(asked):
                    if isinstance(message, Chunk):
                        if not states:
                            cluster.run(*command)
                        got += message.token_ids
                        states.append(client.status().draft)
                    else:
                        assert isinstance(message, Finished)
                assert tuple(got) == expected

        def links_again(job: str, restarts: int) -> None:
            eventually(lambda: client.status().draft == "linked", START_S, f"draft job {job} links")
            found = cluster.job(job)
            assert (found["JobState"], found["Restarts"]) == ("RUNNING", str(restarts))
            again = ask(client, "ssd")
            assert again.token_ids == expected[: len(again.token_ids)]
            assert again.finished.statistics.hits > 0

        # As by an administrator, or when its node goes down.
        loses_its_draft_by("scontrol", "requeue", draft)
        links_again(draft, restarts=1)
        # What Slurm does a minute before the time limit: the job has itself requeued.
        loses_its_draft_by("scancel", "--batch", "--signal=USR1", draft)
        eventually(lambda: cluster.job(draft)["Restarts"] == "2", 30, "the draft job is requeued by itself")
        # Then cancelled for good; another job takes its place.
        cluster.run("scancel", draft)
        cluster.await_state(draft, "CANCELLED")
        replacement = cluster.run(*submit, target, cwd=jobs).split()[-1]
        links_again(replacement, restarts=0)
    cluster.run("scancel", target)
    cluster.await_state(target, "CANCELLED", timeout_s=30)
    # The draft sees that its target's job is gone, and does not wait for another.
    cluster.await_state(replacement, "COMPLETED", timeout_s=60)
