"""The nodes of one torchrun world: how many there are, which is this one, where they meet. Starts nothing."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from launcher import layout
from ssd_runtime.comm.hosts import is_loopback, own_address, split
from ssd_runtime.config import Config
from ssd_runtime.errors import ConfigError


@dataclass(frozen=True)
class Nodes:
    """Where this node stands among those of its world. The target's ranks come first, so node 0 leads.

    Attributes:
        count: nodes of the world.
        rank: of this one; 0 is where the others come to.
        rendezvous: HOST:PORT of node 0, which torchrun's store is served at; the same on all nodes.
        nproc_per_node: ranks on this node; 0 leaves it to `layout.spread`.
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
        return self.nproc_per_node or layout.spread(num_targets, num_drafts, self.count)[self.rank]

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


def _host_and_port(endpoint: str) -> tuple[str, int]:
    try:
        return split(endpoint)
    except ValueError as error:
        raise ConfigError(f"--rendezvous {endpoint!r} is not an address; {error}") from None
