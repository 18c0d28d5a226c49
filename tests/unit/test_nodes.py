"""The nodes of a world: what each runs, how they meet, and what is told to whoever gets it wrong."""

from __future__ import annotations

import pytest

from launcher import rendezvous
from launcher.cli import main
from launcher.nodes import Nodes
from ssd_runtime.comm.control import ControlServer
from ssd_runtime.config import load_config
from ssd_runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ((2, 2, "a:1"), "--node-rank 2 is not one of 2 nodes: 0 to 1"),
        ((2, 0, None), "2 nodes need --rendezvous HOST:PORT"),
        ((2, 0, "node0"), "'node0' is not an address; expected HOST:PORT"),
        ((2, 0, "node0:99999"), "'node0:99999' is not an address"),
        ((1, 0, ":1"), "':1' is not an address"),
    ],
)
def test_nodes_that_cannot_be_are_refused(nodes: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Nodes(*nodes)


def test_a_bad_rendezvous_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture) -> None:
    assert main(["up", "--nnodes", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ssd: error: 2 nodes need --rendezvous HOST:PORT")


def test_ranks_are_spread_evenly_or_as_told() -> None:
    assert Nodes(2, 0, "a:1").ranks_here(6) == 3
    assert Nodes(2, 1, "a:1", nproc_per_node=1).ranks_here(5) == 1
    assert Nodes().ranks_here(2) == 2
    with pytest.raises(ConfigError, match="5 ranks do not spread evenly over 2 nodes; say with --nproc-per-node"):
        Nodes(2, 0, "a:1").ranks_here(5)


def test_all_nodes_give_torchrun_the_same_meeting_place_and_each_its_rank() -> None:
    first, second = (Nodes(2, rank, "10.0.0.1:29500").torchrun(300.0) for rank in (0, 1))
    assert [(a, b) for a, b in zip(first, second, strict=True) if a != b] == [("0", "1")]
    assert first[first.index("--rdzv-backend") + 1] == "static"  # the only one that keeps --node-rank
    assert first[first.index("--rdzv-endpoint") + 1] == "10.0.0.1:29500"
    assert first[first.index("--rdzv-conf") + 1] == "timeout=300"


def test_a_front_door_for_this_node_only_is_opened_to_the_others() -> None:
    assert Nodes().overrides(load_config(None)) == ()
    here = Nodes(2, 0, "127.0.0.1:29500")
    assert here.overrides(load_config(None)) == ('serve.host="127.0.0.1"',)  # the address that leads to the rendezvous
    assert here.overrides(load_config(None, ["serve.host=10.9.8.7"])) == ()
    with pytest.raises(ConfigError, match=r"no way from here to the rendezvous no\.such\.host\.invalid:1"):
        Nodes(2, 1, "no.such.host.invalid:1").overrides(load_config(None))


def test_a_leader_that_ranks_of_other_nodes_cannot_reach_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"serve\.host = 127\.0\.0\.1 is for this node only"):
        rendezvous.own_host(load_config(None))
    assert rendezvous.own_host(load_config(None, ["serve.host=10.9.8.7"])) == "10.9.8.7"
    assert rendezvous.own_host(load_config(None, ["serve.host=0.0.0.0"])) == "127.0.0.1"  # the way to torchrun's store
    with pytest.raises(ConfigError, match="does not say which address drafts of other nodes reach"):
        rendezvous.own_host(load_config(None, ["serve.host=0.0.0.0"]), guests=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert rendezvous.own_host(load_config(None)) == "127.0.0.1"


def test_a_server_of_all_addresses_is_known_by_the_one_it_is_given() -> None:
    with ControlServer("0.0.0.0", 0, known_as="10.9.8.7") as server:
        assert server.address.startswith("tcp://10.9.8.7:")
