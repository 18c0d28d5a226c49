"""The nodes of a torchrun world: how many there are, which is this one, where they meet, which ranks sit on which.

Knows no hardware, starts nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from ssd_runtime.comm.hosts import is_loopback, own_address, split
from ssd_runtime.config import Config
from ssd_runtime.errors import ConfigError
from ssd_runtime.host.cores import Role, listed

COUNTS = "--nproc-per-node"


@dataclass(frozen=True)
class Nodes:
    """Where this node stands among those of its world. The target's ranks come first, so node 0 leads.

    Attributes:
        count: nodes of the world.
        rank: of this one; 0 is where the others come to.
        rendezvous: HOST:PORT of node 0, which torchrun's store is served at; the same on all nodes.
        nproc_per_node: ranks on this node; 0 leaves it to `spread`.
    """

    count: int = 1
    rank: int = 0
    rendezvous: str | None = None
    nproc_per_node: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise ConfigError(f"--node-rank {self.rank} is not one of {self.count} nodes: 0 to {self.count - 1}")
        if self.count > 1 and self.rendezvous is None:
            raise ConfigError(
                f"{self.count} nodes need --rendezvous HOST:PORT, an address of node 0 that all can reach"
            )
        if self.rendezvous is not None:
            _host_and_port(self.rendezvous)

    @property
    def leads(self) -> bool:
        """Whether the leader is on this node."""
        return self.rank == 0

    def ranks_here(self, num_targets: int, num_drafts: int) -> int:
        """How many of a world's ranks this node runs; raises ConfigError for a node without any."""
        return self.nproc_per_node or spread(num_targets, num_drafts, self.count)[self.rank]

    def torchrun(self, join_timeout_s: float) -> list[str]:
        """torchrun's options that make this world, given how many seconds the other nodes may take to come.

        Several nodes meet by the static rendezvous: it keeps --node-rank, where the dynamic one (c10d) would number the
        nodes by their addresses, and the target with them.
        """
        if self.count == 1:
            arguments = ["--nnodes", "1", "--rdzv-backend", "static", "--rdzv-endpoint", "127.0.0.1:0"]
            return [*arguments, "--rdzv-id", uuid.uuid4().hex, "--local-addr", "127.0.0.1"]
        arguments = ["--nnodes", str(self.count), "--node-rank", str(self.rank), "--rdzv-backend", "static"]
        arguments += ["--rdzv-endpoint", str(self.rendezvous), "--rdzv-id", f"ssd-{self.rendezvous}"]
        return [*arguments, "--rdzv-conf", f"timeout={max(1, round(join_timeout_s))}"]

    def overrides(self, config: Config) -> tuple[str, ...]:
        """What to set so that ranks of other nodes reach those of this one: a front door they can reach.

        Raises:
            ConfigError: no way leads to the rendezvous, or it is not an address of node 0.
        """
        if self.count == 1 or not is_loopback(config.serve.host):
            return ()
        host, port = _host_and_port(str(self.rendezvous))
        try:
            here = own_address(host, port)
        except OSError as error:
            raise ConfigError(f"no way from here to the rendezvous {self.rendezvous}: {error.strerror}") from None
        return (f'serve.host="{here}"',)


ONE_NODE = Nodes()


@dataclass(frozen=True)
class Seat:
    """One rank's place.

    Attributes:
        rank: of its world; a draft of a torchrun of its own comes after the targets too.
        node: 0 is the leader's.
    """

    role: Role
    rank: int
    node: int


def num_ranks(config: Config) -> int:
    """The target's ranks, and one for each draft where they have ranks: plain and colocated decoding need none."""
    drafts = 0 if config.speculation.mode in ("ar", "sd-colocated") else config.deployment.drafts
    return config.target.tensor_parallel + drafts


def ranks_by_role(config: Config, role: Role | None = None) -> tuple[int, int]:
    """How many targets and how many drafts one torchrun has: of a whole world, or of a group that has one role."""
    num_targets = config.target.tensor_parallel
    num_drafts = num_ranks(config) - num_targets if role is None else 1
    return (0 if role == "draft" else num_targets), (0 if role == "target" else num_drafts)


def spread(num_targets: int, num_drafts: int, num_nodes: int) -> tuple[int, ...]:
    """Ranks on each node. The target's are kept together: they exchange activations twice a layer, where a draft
    exchanges a few integers a round. So the target has as few nodes as leave none empty, and the drafts go to the last
    of these and to the others, to even out what they run.

    Raises:
        ConfigError: a node would have no rank.
    """
    total = num_targets + num_drafts
    if num_nodes > total:
        raise ConfigError(f"{num_nodes} nodes are too many for {total} rank(s) ({_who(num_targets, num_drafts)})")
    for_targets = max(1, num_nodes - num_drafts) if num_targets else 0
    each, more = divmod(num_targets, max(1, for_targets))
    counts = [each + (node < more) if node < for_targets else 0 for node in range(num_nodes)]
    for _ in range(num_drafts):  # ranks are numbered node by node, targets first: no draft before the last target
        emptiest = min(range(max(0, for_targets - 1), num_nodes), key=lambda node: (counts[node], -node))
        counts[emptiest] += 1
    return tuple(counts)


def parse_counts(text: str, num_targets: int, num_drafts: int, num_nodes: int) -> tuple[int, ...]:
    """Ranks on each node as a user wrote them: one number for all nodes, or N,N,... for each.

    Raises:
        ConfigError: no numbers, not one for each node, or not the ranks there are.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"{COUNTS} {text!r} is not N or N,N,...: ranks on each node, at least 1")
    counts = tuple(int(part) for part in parts)
    if len(counts) == 1:
        counts *= num_nodes
    if len(counts) != num_nodes:
        raise ConfigError(f"{COUNTS} {text} is for {len(counts)} nodes, and there are {num_nodes}")
    if sum(counts) != num_targets + num_drafts:
        raise ConfigError(
            f"{COUNTS} {text} on {num_nodes} node(s) makes {sum(counts)} ranks, and the configuration has "
            f"{num_targets + num_drafts} ({_who(num_targets, num_drafts)})"
        )
    return counts


def seat_ranks(num_targets: int, counts: Sequence[int], first_rank: int = 0) -> tuple[Seat, ...]:
    """The ranks in order, targets first, given how many each node has; from `first_rank` on."""
    nodes = [node for node, count in enumerate(counts) for _ in range(count)]
    return tuple(
        Seat("target" if rank < num_targets else "draft", rank, node) for rank, node in enumerate(nodes, first_rank)
    )


def seats_of(
    config: Config, num_nodes: int = 1, counts: str | None = None, role: Role | None = None
) -> tuple[Seat, ...]:
    """Where the ranks of one torchrun sit: of a world, or with `role` of a group that has no other.

    Args:
        counts: ranks on each node, as `parse_counts` reads them; None leaves it to `spread`.

    Raises:
        ConfigError: counts that do not fit, or a role in a mode without drafts of their own.
    """
    mode = config.speculation.mode
    if role is not None and mode not in ("sd", "ssd"):
        raise ConfigError(f"--role {role} needs speculation.mode sd or ssd, not {mode}")
    ranks = ranks_by_role(config, role)
    on_nodes = spread(*ranks, num_nodes) if counts is None else parse_counts(counts, *ranks, num_nodes)
    num_targets = config.target.tensor_parallel
    return seat_ranks(num_targets, on_nodes, num_targets if role == "draft" else 0)


def who_runs_what(seats: Sequence[Seat]) -> str:
    """Which node runs what, for people."""
    nodes: dict[int, dict[Role, list[int]]] = {}
    for seat in seats:
        nodes.setdefault(seat.node, {}).setdefault(seat.role, []).append(seat.rank)
    each = (
        f"node {node} runs "
        + " and ".join(f"{role} rank{'s' if len(ranks) > 1 else ''} {listed(ranks)}" for role, ranks in roles.items())
        for node, roles in nodes.items()
    )
    return "; ".join(each)


def _who(num_targets: int, num_drafts: int) -> str:
    """Of whom there are how many."""
    parts = [(num_targets, "target"), (num_drafts, "draft")]
    return " and ".join(f"{count} {role}" for count, role in parts if count)


def _host_and_port(endpoint: str) -> tuple[str, int]:
    try:
        return split(endpoint)
    except ValueError as error:
        raise ConfigError(f"--rendezvous {endpoint!r} is not an address; {error}") from None
