"""Waiting for servers, and where to put them."""

import socket
import time
from collections.abc import Callable

__all__ = ["free_port", "wait_until"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    """Poll until the condition holds; an OSError counts as not yet. Fails the test after limit_s."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"waited {limit_s:g} s in vain until {what}")
