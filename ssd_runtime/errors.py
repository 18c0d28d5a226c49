"""What can go wrong, as types. Knows nothing of who raises or who prints.

The command line prints the message of every `SsdError` as one line and leaves with its exit code: 2 for what the user
can mend (`ConfigError`, `RequestError`), 75 (EX_TEMPFAIL of sysexits.h) for what may be tried again later
(`Overloaded`), 74 (EX_IOERR) for what could not be read or written (`InputOutputError`), 1 for what broke while
running.
"""


class SsdError(Exception):
    """Base of every error this project raises on purpose. The message says who, what and what to do."""

    exit_code = 1


class ConfigError(SsdError):
    """A configuration, file or set of ranks that cannot work. The message names the remedy."""

    exit_code = 2


class RequestError(SsdError):
    """A request that cannot be served as asked (empty prompt, too long, unknown parameter)."""

    exit_code = 2


class InputOutputError(SsdError):
    """A file or stream of the user's that could not be read or written: a full disk, a pipe nobody reads."""

    exit_code = 74


class Overloaded(SsdError):
    """A request refused because too many wait already; the same one may be served later (what HTTP calls 503)."""

    exit_code = 75


class DeviceFault(SsdError):
    """A kernel has met what it could not refuse: what is in the device's memory is not to be trusted any more."""


class PeerLost(SsdError):
    """A peer that is dead, silent past its deadline, or talking nonsense.

    Args:
        role: "target", "draft" or "client".
        rank: the peer's global rank (or -1 for a client, and where it is not known which of several is gone).
        round: the round in which it was missed (or -1 before the first).
        reason: what was awaited and what came instead.
    """

    def __init__(self, role: str, rank: int, round: int, reason: str) -> None:
        super().__init__(f"{role if rank < 0 else f'{role} rank {rank}'} lost in round {round}: {reason}")
        self.role, self.rank, self.round, self.reason = role, rank, round, reason
