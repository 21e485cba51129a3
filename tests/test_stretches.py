"""Listings by several requests at once: each key once, whatever the keys are like and whichever answer comes first."""

import bisect
import hashlib
import itertools
import random
import threading
import time
from collections.abc import Callable
from typing import Any

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


def in_no_order(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


ORDERS: dict[str, Callable[[str], Any]] = {
    "UTF-16": lambda key: key.encode("utf-16-be"),
    "no case": lambda key: (key.lower(), key),
    "none": in_no_order,
    "backwards": lambda key: tuple(-ord(letter) for letter in key),
}
MIXED = {f"lib/{letter}{RNG.randbytes(4).hex()}" for letter in "0aAbBzZ\ue000\uff5e\U0001f600" for _ in range(3_000)}
LATE = {f"lib/{number:06d}" for number in range(20_000)} | {f"lib/{letter}" for letter in "aAbB\uff5e\U0001f600"}


class OddServer:
    """Keys come in an order of its own, and begin where that places a text, or always at its first key."""

    def __init__(self, keys: set[str], order: str, begins: str) -> None:
        self.keys, self._order, self._begins = sorted(keys, key=ORDERS[order]), ORDERS[order], begins
        self.num_asked = 0

    def ask(self, after: str, token: str | None) -> Page:
        self.num_asked += 1
        start, _, place = (token or f"{after}\n0").rpartition("\n")
        found = self.keys
        if start and self._begins == "its own":
            found = found[bisect.bisect_right(found, self._order(start), key=self._order) :]
        end = int(place) + 1000
        entries = [(key, 1, 0.0, "") for key in found[int(place) : end]]
        return Page(entries, f"{start}\n{end}" if end < len(found) else None)


@pytest.mark.parametrize("keys", [MIXED, LATE], ids=["mixed", "late"])
@pytest.mark.parametrize("begins", ["its own", "its first"])
@pytest.mark.parametrize("order", ORDERS)
def test_each_key_comes_once_in_whatever_order_a_store_has(order: str, begins: str, keys: set[str]) -> None:
    server = OddServer(keys, order, begins)
    found = [entry[0] for stretch in in_stretches(server.ask, "lib/") for entry in stretch.entries]
    assert sorted(found) == sorted(keys)
    assert server.num_asked < 4 * len(keys) / 1000 + 40
    gaps = [("", "lib/5"), ("lib/A", "lib/a8"), ("lib/b", None)]
    some = {entry[0] for stretch in in_stretches(server.ask, "lib/", gaps) for entry in stretch.entries}
    missing = keys - some
    assert all("lib/5" < key <= "lib/A" or "lib/a8" < key <= "lib/b" for key in missing)
