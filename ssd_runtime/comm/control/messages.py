"""Everything that travels on the control plane, as frozen dataclasses: what anyone may say, and the list of all.

Those of one conversation are in draft_messages.py, client_messages.py and launcher_messages.py. Knows no bytes
(codec.py) and no sockets (sockets.py).
"""

from __future__ import annotations

import typing
from dataclasses import dataclass

from ssd_runtime.comm.control.client_messages import Cancel, Chunk, Failed, Finished, Generate, GetStatus, Status
from ssd_runtime.comm.control.draft_messages import Admit, Finish, Hello, Portion, Welcome
from ssd_runtime.comm.control.launcher_messages import Joined, Progress, Ready, WorkerFailed
from ssd_runtime.comm.protocol import Name, Reason


@dataclass(frozen=True)
class Refused:
    """The answer to a Hello that does not fit, or to bytes that are no message.

    Attributes:
        again: the same Hello may be welcome later.
    """

    reason: Reason
    again: bool = False


@dataclass(frozen=True)
class Heartbeat:
    """I am alive and have nothing to say."""


@dataclass(frozen=True)
class Shutdown:
    """Stop what you do and leave. Sent by the leader to the draft, and by a launcher or client to the leader.

    Attributes:
        key: of the engine (`Ready.key`), which lets whoever started it end it from anywhere.
    """

    reason: Reason
    key: Name = ""


Message = (
    Hello | Welcome | Refused | Admit | Finish | Portion | Heartbeat | Shutdown
    | Generate | Chunk | Finished | Failed | Cancel | GetStatus | Status
    | Progress | Ready | Joined | WorkerFailed
)  # fmt: skip
MESSAGE_TYPES: dict[str, type[Message]] = {cls.__name__: cls for cls in typing.get_args(Message)}
