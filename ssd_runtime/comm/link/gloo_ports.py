"""The ports that Gloo listens at: watched while a group is built, deaf to everybody from then on. Knows no groups.

Facts this rests on (torch 2.13, Gloo): a device listens from its making to its end, though nobody is expected once its
group is built. It keeps the descriptor of every connection it accepts, whoever made it and even if it was closed at
once, until the device ends; and where the system has no descriptor left it aborts the process. Its listening socket
cannot be closed beneath it. But the kernel can drop whatever comes for that socket (SO_ATTACH_FILTER, socket(7)):
strangers then find nobody there, and connections that stand do not notice.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

log = logging.getLogger(__name__)

STRANGERS = 256  # descriptors that this process may gain while a group is built, and a quarter of the limit at most
LOOK_S = 0.005  # between two looks at them
SPARE = 512  # descriptors that must be free before a port is opened, and half the limit at most
BACKLOG = 16  # connections that wait in the kernel until Gloo accepts them, also after its port was shut
SO_ATTACH_FILTER = 26  # asm-generic/socket.h
DROP = struct.pack("HBBI", 0x06, 0, 0, 0)  # return 0: of a packet nothing is kept (BPF_RET, linux/bpf_common.h)

Device = TypeVar("Device")
opening = threading.Lock()  # whoever starts to listen while others may make devices holds it, so each finds its own


@contextlib.contextmanager
def heard_while_built(make: Callable[[], Device]) -> Iterator[Device]:
    """A device whose port is open within the block, for at most STRANGERS connections or so, and deaf after it.

    Raises:
        OSError: this process has too few descriptors left to listen to strangers.
    """
    with contextlib.ExitStack() as held:
        with opening:
            _check_spare()
            before = _sockets()
            device = make()
            ports = [held.enter_context(port) for port in _listening(_sockets() - before)]
        for port in ports:
            port.listen(BACKLOG)
        built = threading.Event()
        guard = threading.Thread(target=_guard, args=(ports, built), name="gloo-ports", daemon=True)
        guard.start()
        try:
            yield device
        finally:
            built.set()
            guard.join()
            _deafen(ports)


def _guard(ports: list[socket.socket], built: threading.Event) -> None:
    """Shut the ports if strangers come in numbers: the build then fails at its deadline, or succeeds without them."""
    most = _descriptors() + min(STRANGERS, _limit() // 4)
    while not built.wait(LOOK_S):
        if _descriptors() > most:
            _deafen(ports)
            log.warning("strangers came to a port that is for building a link; it hears nobody any more")
            return


def _deafen(ports: list[socket.socket]) -> None:
    program = ctypes.create_string_buffer(DROP)
    filter = struct.pack("@HP", 1, ctypes.addressof(program))  # struct sock_fprog
    for port in ports:
        try:
            port.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filter)
        except OSError as error:
            log.warning("port %s stays open to strangers: %s", port.getsockname()[1], error.strerror)


def _check_spare() -> None:
    taken, limit = _descriptors(), _limit()
    if taken + min(SPARE, limit // 2) > limit:
        raise OSError(f"{taken} of {limit} descriptors are taken, too many to listen to strangers (see ulimit -n)")


def _limit() -> int:
    """How many descriptors this process may have."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 30 if limit == resource.RLIM_INFINITY else limit


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _sockets() -> set[tuple[int, str]]:
    """Descriptor and inode of every socket of this process: a descriptor alone may have been another's before."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile by another thread
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
    return found


def _listening(candidates: set[tuple[int, str]]) -> Iterator[socket.socket]:
    """Duplicates of those that listen for TCP connections; they stay valid whatever the owner does."""
    for fd, kind in candidates:
        with contextlib.suppress(OSError):
            if kind.startswith("socket:"):
                one = socket.socket(fileno=os.dup(fd))
                if one.family != socket.AF_UNIX and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    yield one
                else:
                    one.close()
