"""The nodes of a world: what each runs, how they meet, and what is told to whoever gets it wrong."""

from __future__ import annotations

import re

import pytest

from launcher import preflight
from launcher.cli import main
from launcher.nodes import Nodes, parse_counts, seat_ranks, spread
from launcher.ranks import rendezvous
from ssd_runtime.comm import hosts
from ssd_runtime.comm.control.server import ControlServer
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


@pytest.mark.parametrize(
    ("targets", "drafts", "nodes", "counts"),
    [
        (1, 1, 1, (2,)),
        (1, 1, 2, (1, 1)),
        (4, 1, 2, (4, 1)),
        (4, 2, 2, (4, 2)),
        (4, 2, 3, (4, 1, 1)),
        (4, 1, 3, (2, 2, 1)),
        (4, 1, 5, (1, 1, 1, 1, 1)),
        (8, 3, 2, (8, 3)),
        (5, 0, 2, (3, 2)),
        (0, 1, 1, (1,)),
        (0, 3, 2, (1, 2)),
        (1, 3, 2, (2, 2)),
        (2, 4, 2, (3, 3)),
    ],
)
def test_the_ranks_of_a_target_are_kept_together_and_every_node_has_one(
    targets: int, drafts: int, nodes: int, counts: tuple[int, ...]
) -> None:
    assert spread(targets, drafts, nodes) == counts
    here = [Nodes(nodes, rank, "a:1").ranks_here(targets, drafts) for rank in range(nodes)]
    assert tuple(here) == counts
    seats = seat_ranks(targets, counts)
    assert [seat.role for seat in seats] == ["target"] * targets + ["draft"] * drafts
    assert [seat.rank for seat in seats] == list(range(targets + drafts))
    assert [sum(seat.node == node for seat in seats) for node in range(nodes)] == list(counts)


def test_ranks_on_a_node_may_be_told_and_no_node_is_without() -> None:
    assert Nodes(2, 1, "a:1", nproc_per_node=1).ranks_here(4, 1) == 1
    assert parse_counts("2, 3", 4, 1, 2) == (2, 3)
    assert parse_counts("3", 4, 2, 2) == (3, 3)
    with pytest.raises(ConfigError, match=r"6 nodes are too many for 5 rank\(s\) \(4 target and 1 draft\)"):
        Nodes(6, 0, "a:1").ranks_here(4, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4,x", "'4,x' is not N or N,N,...: ranks on each node, at least 1"),
        ("5,0", "'5,0' is not N or N,N,...: ranks on each node, at least 1"),
        ("2,2,1", "--nproc-per-node 2,2,1 is for 3 nodes, and there are 2"),
        ("4", "--nproc-per-node 4 on 2 node(s) makes 8 ranks, and the configuration has 5 (4 target and 1 draft)"),
    ],
)
def test_counts_of_ranks_that_cannot_be_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_counts(text, 4, 1, 2)


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
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert rendezvous.own_host(load_config(None)) == "127.0.0.1"


@pytest.mark.parametrize(("host", "port"), [("::1", "295oo"), ("10.0.0.1", "99999"), ("10.0.0.1", ""), ("", "1")])
def test_an_address_of_torchruns_store_that_is_none_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, host: str, port: str
) -> None:
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", port)
    told = (
        f"MASTER_ADDR={host!r} and MASTER_PORT={port!r} are no address of torchrun's store; they are torchrun's to set"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(told)}$"):
        rendezvous.store(load_config(None))


def test_guests_are_told_an_address_of_a_leader_that_listens_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    everywhere = load_config(None, ["serve.host=0.0.0.0"])
    own = {address for _, address in hosts.interfaces()}
    assert rendezvous.own_host(everywhere, guests=True) in own
    monkeypatch.setattr(hosts, "own_address", no_route)  # no default route: an interface's, if there is one
    others = own - {"127.0.0.1"}
    assert rendezvous.own_host(everywhere, guests=True) in (others or own)
    monkeypatch.setattr(hosts, "interfaces", lambda: iter([("lo", "127.0.0.1"), ("eth1", "10.9.8.7")]))
    assert rendezvous.own_host(everywhere, guests=True) == "10.9.8.7"
    monkeypatch.setattr(hosts, "interfaces", lambda: iter([("lo", "127.0.0.1")]))
    assert rendezvous.own_host(everywhere, guests=True) == "127.0.0.1"
    monkeypatch.setattr(rendezvous, "own_address", lambda host, port: "10.9.8.6")  # the store is on another node
    assert rendezvous.own_host(everywhere, guests=True) == "10.9.8.6"


def no_route(host: str, port: int) -> str:
    raise OSError("Network is unreachable")


def test_the_address_to_announce_is_one_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    told = load_config(None, ["serve.host=0.0.0.0", "serve.announce=127.0.0.2"])
    assert rendezvous.own_host(told, guests=True) == "127.0.0.2"
    preflight.check_port(told)
    for foreign in ("192.0.2.1", "0.0.0.0", "no.such.host.invalid"):
        refused = load_config(None, ["serve.host=0.0.0.0", f"serve.announce={foreign}"])
        for check in (preflight.check_port, rendezvous.own_host):
            with pytest.raises(ConfigError, match=f"serve.announce = {foreign} is not an address of this node"):
                check(refused)
    with pytest.raises(ConfigError, match=r"'serve\.announce' is for serve\.host = 0\.0\.0\.0"):
        load_config(None, ["serve.announce=127.0.0.2"])


def test_a_server_of_all_addresses_is_known_by_the_one_it_is_given() -> None:
    with ControlServer.bind("0.0.0.0", 0, known_as="10.9.8.7") as server:
        assert server.address.startswith("tcp://10.9.8.7:")
