"""No test reaches the network: a socket of the internet ends the process that opens it, in C++ as in Python, and in
every process that a test starts.

On Linux the kernel sees to it (seccomp: `socket(AF_INET)` and `socket(AF_INET6)` raise SIGSYS), elsewhere Python's
audit events alone, which do not see C++. What needs the loopback device, torch.distributed under gloo, asks for the
fixture `loopback`: its thread was there before the filter, and neither it nor what it starts has one.

A bare datagram socket is refused, no more: libuuid asks for one to read the network card's address, and does without
(Python's `uuid1`, in `onnx.save`). Looking up a name opens another kind.
"""

import ctypes
import errno
import faulthandler
import os
import platform
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

INTERNET = (socket.AF_INET, socket.AF_INET6)
# (the kernel's number of the architecture, that of the system call `socket` there)
_ARCHITECTURES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE, _TRAP = 0x7FFF0000, 0x00050000, 0x00030000
_LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")

attempts: list[str] = []
"""What Python code of this process tried, for those who swallow the error."""


class SocketOpenedError(RuntimeError):
    """A test that says it needs no network opens a socket, or looks up a name."""


class Loopback:
    """A thread without the filter."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self.ident = self._thread.submit(threading.get_ident).result()

    def __call__(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What the call returns in that thread."""
        return self._thread.submit(call, *arguments, **options).result()


def forbid_sockets() -> tuple[Loopback, str]:
    """From now on this thread, later ones and all processes that they start open no socket of the internet; the way
    around that, and a sentence on what forbids it."""
    loopback = Loopback()

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "socket.__new__" and arguments[1] in INTERNET
        if (opened or event in _LOOKUPS) and threading.get_ident() != loopback.ident:
            attempts.append(f"{event} {arguments[1:] if opened else arguments}")
            raise SocketOpenedError(attempts[-1])

    sys.addaudithook(refuse)
    if not _filter_sockets():
        return loopback, "forbidden to Python code (audit events); C++ is not watched on this system"
    faulthandler.register(signal.SIGSYS, os.dup(2), chain=True)  # says where, before the process ends
    return loopback, "forbidden by the kernel (seccomp), in every process of the tests"


def _filter_sockets() -> bool:
    """Whether the kernel took the filter."""
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES:
        return False
    architecture, number = _ARCHITECTURES[platform.machine()]
    # (operation, steps if equal, steps if not, value); the loads read struct seccomp_data
    steps = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 0, 7, architecture),
        (_LOAD, 0, 0, 0),
        (_EQUAL, 0, 5, number),
        (_LOAD, 0, 0, 16),  # the first argument
        (_EQUAL, 1, 0, socket.AF_INET),
        (_EQUAL, 0, 2, socket.AF_INET6),
        (_LOAD, 0, 0, 24),  # the second
        (_EQUAL, 1, 2, socket.SOCK_DGRAM),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE | errno.EACCES),
        (_RETURN, 0, 0, _TRAP),
    ]
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    memory = ctypes.create_string_buffer(code)
    program = struct.pack("@HP", len(steps), ctypes.addressof(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return False
    return libc.prctl(_SET_SECCOMP, _FILTER, ctypes.c_char_p(program), 0, 0) == 0
