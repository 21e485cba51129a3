"""Listing a bucket by several requests at once: keys are cut into ranges, and a range in two where a thread is free.

S3 gives 1,000 keys an answer, in order, from any text on. So the next text that differs from the present key at an
early character is asked for: what comes is the first page of a range of its own, and nothing was asked in vain. It
needs no folders in the keys, and holds no more than an answer a thread.

What is easy to break: each key comes once, whatever the texts are at which ranges are cut, and however late an answer.
And other stores have other orders (of UTF-16, without case, none at all), so an order is used and never believed: a
range ends where it meets a key that the store gave behind the cut, and nothing is left out since it compares as smaller
or larger. Where an answer shows another order nothing is cut any more, and tokens lead to the end.
"""

import operator
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

__all__ = ["WHOLE", "Entry", "Gap", "Page", "Stretch", "in_stretches", "is_marker"]

Entry = tuple[str, int, float, str]
"""Key, size, time, etag."""
Gap = tuple[str, str | None]
"""What is to be listed: keys behind the first text, up to and with the second one; None is the end of the bucket. Of a
store with another order more may come, and what came before once more."""
WHOLE: tuple[Gap, ...] = (("", None),)

_THREADS = 16
_PAGES_ALONE = 8  # so many answers come one after the other first: a small listing costs no request more
_VAIN = 20  # requests that found nothing, more than pages that came: then keys lie so that cutting does not pay
_LAST_CODE = 0x10FFFF


@dataclass(frozen=True, slots=True)
class Page:
    """One answer of a store: at most 1,000 keys."""

    entries: list[Entry]
    token: str | None
    """By which the next one is asked for; None for the last."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """All keys behind `after`, up to and with `until`."""

    after: str
    until: str | None
    entries: list[Entry]
    is_last: bool
    """No stretch will come that begins where this one ends."""


@dataclass(slots=True, eq=False)
class _Range:
    """Keys that are still to be listed: those behind `after`, up to and with `until`."""

    after: str
    until: str | None
    behind: frozenset[str] | None = None
    """The first keys that the store gave behind `until`: one of them ends the range. None where they are not known."""
    token: str | None = None
    shared: int = -1
    """Length of what the keys of its last page had in common; -1 before there was one."""
    is_probed: bool = False
    is_done: bool = False


def in_stretches(ask: Callable[[str, str | None], Page], prefix: str, gaps: Iterable[Gap] = WHOLE) -> Iterator[Stretch]:
    """Everything in the gaps, in stretches that come in no order; those of one range follow each other.

    Args:
        ask: the page behind a text, or that of a token; runs in threads, and what it raises ends the listing.
    """
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="list")
    listing = _Listing(prefix, gaps)
    asked: dict[Future[Page], tuple[_Range, str | None]] = {}
    try:
        while True:
            while len(asked) < _THREADS and (question := listing.next_question()):
                keys, cut = question
                place = (cut, None) if cut is not None else (keys.after, keys.token)
                asked[pool.submit(ask, *place)] = question
            if not asked:
                return
            done, _ = wait(asked, return_when=FIRST_COMPLETED)
            for future in done:
                keys, cut = asked.pop(future)
                yield from listing.take(keys, cut, future.result())
    finally:
        pool.shutdown(cancel_futures=True)


class _Listing:
    """Which ranges there are, and what is asked next."""

    def __init__(self, prefix: str, gaps: Iterable[Gap]) -> None:
        self._depth = len(prefix)
        self._waiting = [_Range(after, until) for after, until in gaps][::-1]
        self._open: list[_Range] = []
        self._num_pages = self._num_vain = 0
        self._may_cut = True

    def next_question(self) -> tuple[_Range, str | None] | None:
        """The range whose next page is to be asked for; or one, and the text at which it may be cut."""
        if self._waiting:
            found = self._waiting.pop()
            self._open.append(found)
            is_bounded = found.until is None or found.behind is not None
            return found, None if is_bounded else found.until
        if not self._may_cut or self._num_pages < _PAGES_ALONE or self._num_vain > _VAIN + self._num_pages:
            return None
        cuts = [(cut, found) for found in self._open if not found.is_probed and (cut := self._cut(found))]
        if not cuts:
            return None
        cut, found = min(cuts, key=lambda item: len(item[0]))  # the shorter, the more may lie behind it
        found.is_probed = True
        return found, cut

    def _cut(self, found: _Range) -> str:
        """The earliest text of a longer range that differs from its present key in the last character; "" for none."""
        for depth in range(self._depth, min(found.shared + 1, len(found.after))):
            code = ord(found.after[depth]) + 1
            code = 0xE000 if 0xD800 <= code < 0xE000 else code  # surrogates are no text
            if code <= _LAST_CODE:
                cut = found.after[:depth] + chr(code)
                if found.until is None or cut < found.until:
                    return cut
        return ""

    def take(self, keys: _Range, cut: str | None, page: Page) -> Iterator[Stretch]:
        """What an answer brings; the range goes on behind it."""
        self._num_pages += 1
        start = keys.after if cut is None else cut
        is_in_order = _is_in_order(page, start)
        self._may_cut = self._may_cut and is_in_order  # or this server does not begin where it is asked to
        if cut is None:
            if keys.is_done:
                return
            if not is_in_order and keys.after and keys.token is None:
                self._start_anew()
            else:
                yield self._go_on(keys, page)
        elif cut == keys.until and keys.behind is None:
            if is_in_order:
                keys.behind = _keys_of(page)
                self._open.remove(keys)
                self._waiting.append(keys)
            elif not keys.is_done:
                self._start_anew()
        else:
            yield from self._cut_off(keys, cut, page)

    def _cut_off(self, keys: _Range, cut: str, page: Page) -> Iterator[Stretch]:
        """Make what lies behind a cut a range of its own, whose first page this is."""
        keys.is_probed = False
        if not self._may_cut or keys.is_done or keys.after >= cut or (keys.until is not None and cut >= keys.until):
            self._num_vain += 1
            return
        rest = _Range(cut, keys.until, keys.behind)
        keys.until = cut
        keys.behind = _keys_of(page)
        self._open.append(rest)
        stretch = self._go_on(rest, page)
        self._num_vain += not stretch.entries
        yield stretch

    def _start_anew(self) -> None:
        """List everything, since a gap cannot be told from the rest where the order is another one."""
        for keys in (*self._open, *self._waiting):
            keys.is_done = True
        self._open = []
        self._waiting = [_Range("", None)]

    def _go_on(self, keys: _Range, page: Page) -> Stretch:
        after, until = keys.after, keys.until
        behind = keys.behind or frozenset()
        end = next((place for place, entry in enumerate(page.entries) if entry[0] in behind), None)
        entries = page.entries[:end]
        self._open.remove(keys)
        if page.token is None or end is not None:
            keys.is_done = True
            return Stretch(after, until, entries, True)
        if page.entries:
            keys.after = page.entries[-1][0]
        keys.token = page.token
        keys.shared = _shared(page.entries[0][0], keys.after) if page.entries else -1
        self._waiting.append(keys)
        return Stretch(after, keys.after, entries, False)


def _keys_of(page: Page) -> frozenset[str]:
    return frozenset(entry[0] for entry in page.entries)


def _is_in_order(page: Page, after: str) -> bool:
    """Whether a page's keys follow each other, and a text."""
    keys = [entry[0] for entry in page.entries]
    return all(map(operator.lt, [after, *keys], keys))


def _shared(first: str, last: str) -> int:
    """How many characters two texts begin with that are the same."""
    for place, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return place
    return min(len(first), len(last))


def is_marker(key: str, size_bytes: int | None) -> bool:
    """Whether an object is the marker of an empty "folder"."""
    return key.endswith("/") and not size_bytes
