"""One torchrun world over two hosts: target on one, draft on the other, joined by nothing but a network."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from ssd_runtime.comm.control.client_messages import Chunk, Finished, Generate
from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.host import topology
from ssd_runtime.model.load import load_decoder
from ssd_runtime.model.text.tokenizer import Tokenizer
from ssd_runtime.speculation.types import SamplingParams
from tests.cluster.hosts import Lab
from tests.cluster.runs import ask, client_on, cores_apart
from tests.engines import in_process, request
from tests.process.conftest import Start
from tests.process.runs import SSD, Run, error_line, eventually
from tests.tiny_models import CPU

pytestmark = pytest.mark.process
APART = cores_apart(topology.allowed_cores())
RENDEZVOUS = "10.77.0.1:29500"


def up(run: Start, lab: Lab, config: Path, *arguments: str, counts: tuple[int, int] | None = None) -> tuple[Run, Run]:
    """`ssd up` on both hosts; `counts` says how many ranks each has."""
    world = ["--nnodes", "2", "--rendezvous", RENDEZVOUS, *APART, *arguments]
    nodes = []
    for rank, host in enumerate(lab.hosts):
        here = ["--node-rank", str(rank)] + (["--nproc-per-node", str(counts[rank])] if counts else [])
        nodes.append(run(*host.command(*SSD, "up", "--config", str(config), *here, *world)))
    return nodes[0], nodes[1]


def test_two_hosts_give_the_tokens_of_one_and_end_together(cable: Lab, run: Start, config: Path) -> None:
    first, second = up(run, cable, config, "--set", "deployment.drafts=3")
    address = first.until("address: ")
    assert address.startswith("tcp://10.77.0.1:")
    params = SamplingParams(temperature=0.8, seed=5)
    with client_on(cable.hosts[1], address) as client:
        plain, ours = ask(client, "ar", params=params), ask(client, "ssd", params=params)
    assert len(plain.token_ids) == 48
    assert ours.token_ids == plain.token_ids
    assert ours.finished.statistics.hits > 0
    assert [ranks_of(node) for node in (first, second)] == [["0", "1"], ["2", "3"]]
    assert "draft 1 on core" in first.out
    first.process.send_signal(signal.SIGTERM)
    assert (first.exit_code(20), second.exit_code(20)) == (0, 0)
    for node in (first, second):
        node.assert_nothing_is_left()
        assert list(node.temporary.iterdir()) == []


def test_two_hosts_that_share_a_target_unevenly_give_the_tokens_of_one_rank(
    cable: Lab, run: Start, config: Path, models: Path
) -> None:
    model = str(models / "draft")  # of few layers: each costs two rounds over the wire
    shared = ("--set", "target.tensor_parallel=2", "--set", f"target.model={model}")
    first, second = up(run, cable, config, *shared, counts=(1, 2))
    address = first.until("address: ")
    assert address.startswith("tcp://10.77.0.1:")
    with client_on(cable.hosts[1], address) as client:
        for params in (SamplingParams(), SamplingParams(temperature=0.8, seed=5)):
            expected = alone(model, params)
            assert len(expected) == 48
            assert ask(client, "ar", params=params).token_ids == expected
            ours = ask(client, "ssd", params=params)
            assert ours.token_ids == expected
            assert ours.finished.statistics.hits > 0
    assert [ranks_of(node) for node in (first, second)] == [["0"], ["1", "2"]]
    first.process.send_signal(signal.SIGTERM)
    assert (first.exit_code(20), second.exit_code(20)) == (0, 0)
    for node in (first, second):
        node.assert_nothing_is_left()
        assert list(node.temporary.iterdir()) == []


def alone(model: str, params: SamplingParams) -> tuple[int, ...]:
    """What one rank answers to `ask`, in this process and without a draft."""
    decoder = load_decoder(model, "fp32", CPU)
    prompt = tuple(Tokenizer.from_model(model).encode("the quick brown"))
    engine = EngineConfig(max_model_len=256, block_size=8)
    process = in_process(decoder, decoder, engine, SpeculationConfig(), lambda: 0)
    (sequence,) = process.run([request(prompt, "ar", max_tokens=48, params=params)])
    return tuple(sequence.tokens[sequence.num_prompt :])


def ranks_of(node: Run) -> list[str]:
    return sorted({e["RANK"] for p in node.members() if "RANK" in (e := p.environ())})


def test_a_host_that_is_lost_does_not_end_the_stream(cable: Lab, run: Start, config: Path) -> None:
    first, second = up(run, cable, config)
    address = first.until("address: ")
    with client_on(cable.hosts[0], address) as client:
        expected = ask(client, "ar", max_tokens=400).token_ids
        request = Generate("r", prompt="the quick brown", max_tokens=400, ignore_eos=True, mode="ssd")
        got: list[int] = []
        for message in client.generate(request):
            if isinstance(message, Chunk):
                if not got:
                    second.rank(1).kill()
                got += message.token_ids
            else:
                assert isinstance(message, Finished)
        assert tuple(got) == expected
        eventually(lambda: client.status().draft == "lost", 20, "the engine says that its draft is lost")
    assert second.exit_code(30) == 1
    assert "draft rank 1 was killed by signal 9" in error_line(second.err)
    first.process.send_signal(signal.SIGTERM)
    first.exit_code(30)
    for node in (first, second):
        node.assert_nothing_is_left()


def test_plain_torchrun_over_two_hosts(cable: Lab, run: Start, config: Path) -> None:
    """As by hand: the dynamic rendezvous needs to be told who hosts it and at which address each node is."""
    worker = ["-m", "launcher.worker", "--config", str(config), "--set", "serve.host=0.0.0.0", *APART]
    nodes = []
    for rank, host in enumerate(cable.hosts):
        torchrun = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "0", "--rdzv-id", "by-hand"]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", RENDEZVOUS, "--local-addr", host.address]
        torchrun += ["--rdzv-conf", f"is_host={'false' if rank else 'true'}"]
        nodes.append(run(*host.command(sys.executable, "-m", "torch.distributed.run", *torchrun, *worker)))
    address = nodes[0].until("address: ")
    assert address.startswith("tcp://10.77.0.1:")
    with client_on(cable.hosts[1], address) as client:
        assert ask(client, "ssd").token_ids == ask(client, "ar").token_ids
    for node in nodes:
        node.process.send_signal(signal.SIGTERM)
    for node in nodes:
        node.exit_code(20)
        node.assert_nothing_is_left()
