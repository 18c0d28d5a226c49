"""torchrun, whose store listens where it was told and nowhere else: `python -m launcher.agent`, in place of
`python -m torch.distributed.run`, with the same arguments. Of torch's rendezvous it changes the static one alone.

torch's own store listens at every address of the host, whatever --rdzv-endpoint says, and believes whoever comes.
"""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import Store, TCPStore, run
from torch.distributed.elastic.rendezvous import RendezvousInfo, static_tcp_rendezvous
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from ssd_runtime.comm.hosts import listen

BACKLOG = 2048  # as torch has it


class BoundRendezvous(StaticTCPRendezvous):
    """The static rendezvous, at the address of --rdzv-endpoint; port 0 takes a free one."""

    master_addr: str
    master_port: int
    rank: int
    world_size: int
    timeout: timedelta
    _store: Store | None

    def next_rendezvous(self) -> RendezvousInfo:
        if self.rank == 0 and self._store is None:
            with listen(self.master_addr, self.master_port, BACKLOG) as listener:
                port: int = listener.getsockname()[1]
                self._store = TCPStore(
                    self.master_addr,
                    port,
                    self.world_size,
                    True,
                    self.timeout,
                    master_listen_fd=listener.detach(),  # the store's from here on
                )
            self.master_port = port
        return super().next_rendezvous()


def main() -> None:
    """Run torchrun; its arguments are the process's."""
    static_tcp_rendezvous.StaticTCPRendezvous = BoundRendezvous
    run.main()


if __name__ == "__main__":
    main()
