"""Where the ranks of one torchrun sit: how many on each node, and which. Knows no hardware, starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssd_runtime.errors import ConfigError
from ssd_runtime.host.cores import Role, listed

COUNTS = "--nproc-per-node"


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


def spread(num_targets: int, num_drafts: int, num_nodes: int) -> tuple[int, ...]:
    """Ranks on each node. The target's are kept together: they exchange activations twice a layer, where a draft
    exchanges a few integers a round. So the target has as few nodes as leave none empty, and the drafts go to the last
    of these and to the others, to even out what they run.

    Raises:
        ConfigError: a node would have no rank.
    """
    num_ranks = num_targets + num_drafts
    if num_nodes > num_ranks:
        raise ConfigError(f"{num_nodes} nodes are too many for {num_ranks} rank(s) ({who(num_targets, num_drafts)})")
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
            f"{num_targets + num_drafts} ({who(num_targets, num_drafts)})"
        )
    return counts


def seats(num_targets: int, counts: Sequence[int], first_rank: int = 0) -> tuple[Seat, ...]:
    """The ranks in order, targets first, given how many each node has; from `first_rank` on."""
    nodes = [node for node, count in enumerate(counts) for _ in range(count)]
    return tuple(
        Seat("target" if rank < num_targets else "draft", rank, node) for rank, node in enumerate(nodes, first_rank)
    )


def describe(seats: Sequence[Seat]) -> str:
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


def who(num_targets: int, num_drafts: int) -> str:
    """Of whom there are how many."""
    parts = [(num_targets, "target"), (num_drafts, "draft")]
    return " and ".join(f"{count} {role}" for count, role in parts if count)
