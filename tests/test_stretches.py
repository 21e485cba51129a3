"""Listings by several requests at once: each key once, whatever the keys are like and whichever answer comes first."""

import bisect
import itertools
import random
import threading
import time
from collections.abc import Callable

import pytest

from kinoray.storage.stretches import Page, Stretch, in_stretches

RNG = random.Random(0)
FLAT = [f"lib/{number:09d}.mp4" for number in range(60_000)]
SHAPES = {
    "flat": FLAT,
    "folders": [
        f"lib/{a}/2024-{b:02d}/{c:04d}.mp4" for a in ("bus", "car", "tram") for b in range(12) for c in range(900)
    ],
    "digests": [f"lib/{RNG.randbytes(8).hex()}" for _ in range(40_000)],
    "lopsided": ["lib/zz", *(f"lib/a/{'x' * 40}/{number:06d}" for number in range(30_000))],
    "odd": [
        f"lib/{chr(code)}{RNG.randbytes(3).hex()}" for code in (1, 0x7F, 0xD7FF, 0xE000, 0x10FFFF) for _ in range(5_000)
    ],
    "one folder a video": [f"lib/{number:06d}/video.mp4" for number in range(20_000)],
    "small": FLAT[:1_000],
    "none": [],
}


class Server:
    """Answers as S3 does."""

    def __init__(self, keys: list[str], *, latency_s: float = 0.0, begins: bool = True) -> None:
        self.keys, self.num_asked = sorted(keys), 0
        self._latency_s, self._begins, self._lock = latency_s, begins, threading.Lock()

    def ask(self, after: str, token: str | None) -> Page:
        with self._lock:
            self.num_asked += 1
        time.sleep(self._latency_s)
        start = int(token) if token else bisect.bisect_right(self.keys, after) if after and self._begins else 0
        entries = [(key, 1, 0.0, "") for key in self.keys[start : start + 1000]]
        return Page(entries, str(start + 1000) if start + 1000 < len(self.keys) else None)


def keys_of(stretches: list[Stretch]) -> list[str]:
    """Their keys in order; stretches fit together without a gap."""
    ordered = sorted(stretches, key=lambda stretch: (stretch.after, stretch.until is None, stretch.until or ""))
    for one, other in itertools.pairwise(ordered):
        assert one.until == other.after
    return [entry[0] for stretch in ordered for entry in stretch.entries]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_key_comes_once_and_few_requests_are_in_vain(shape: str) -> None:
    server = Server(SHAPES[shape])
    assert keys_of(list(in_stretches(server.ask, "lib/"))) == server.keys
    num_pages = max(1, -(-len(server.keys) // 1000))
    assert server.num_asked <= (num_pages if num_pages <= 8 else 3 * num_pages + 40)


def test_a_large_listing_takes_a_fraction_of_the_time() -> None:
    server = Server(FLAT, latency_s=0.03)
    begin = time.monotonic()
    assert keys_of(list(in_stretches(server.ask, "lib/"))) == server.keys
    took_s = time.monotonic() - begin
    assert took_s < 0.6 * 60 * 0.03, f"{took_s} s, {server.num_asked} requests"


def test_only_what_lies_in_the_gaps_is_listed() -> None:
    server = Server(FLAT)
    gaps = [("", FLAT[1_500]), (FLAT[20_000], FLAT[20_001]), (FLAT[40_000], FLAT[52_345]), (FLAT[59_990], None)]
    found = sorted(entry[0] for stretch in in_stretches(server.ask, "lib/", gaps) for entry in stretch.entries)
    assert found == FLAT[:1_501] + FLAT[20_001:20_002] + FLAT[40_001:52_346] + FLAT[59_991:]
    assert server.num_asked < 60


def test_a_server_that_cannot_begin_anywhere_is_asked_page_by_page() -> None:
    server = Server(FLAT, begins=False)
    assert keys_of(list(in_stretches(server.ask, "lib/"))) == server.keys
    assert server.num_asked < 60 + 20


def test_the_error_of_a_page_ends_the_listing() -> None:
    server = Server(FLAT)

    def failing(ask: Callable[[str, str | None], Page]) -> Callable[[str, str | None], Page]:
        def answer(after: str, token: str | None) -> Page:
            if server.num_asked == 20:
                raise OSError("gone")
            return ask(after, token)

        return answer

    with pytest.raises(OSError, match="gone"):
        list(in_stretches(failing(server.ask), "lib/"))
    assert server.num_asked < 40
