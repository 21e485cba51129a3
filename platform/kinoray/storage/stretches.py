"""Listing a bucket by several requests at once: keys are cut into ranges, and a range in two where a thread is free.

S3 gives 1,000 keys an answer, in order, from any text on. So the next text that differs from the present key at an
early character is asked for: what comes is the first page of a range of its own, and nothing was asked in vain. It
needs no folders in the keys, and holds no more than an answer a thread.

What is easy to break: each key comes once, whatever the texts are at which ranges are cut, and however late an answer.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

__all__ = ["WHOLE", "Entry", "Gap", "Page", "Stretch", "in_stretches", "is_marker"]

Entry = tuple[str, int, float, str]
"""Key, size, time, etag."""
Gap = tuple[str, str | None]
"""What is to be listed: keys behind the first text, up to and with the second one; None is the end of the bucket."""
WHOLE: tuple[Gap, ...] = (("", None),)

_THREADS = 16
_PAGES_ALONE = 8  # so many answers come one after the other first: a small listing costs no request more
_VAIN = 20  # requests that found nothing, more than pages that came: then keys lie so that cutting does not pay
_LAST_CODE = 0x10FFFF


@dataclass(frozen=True, slots=True)
class Page:
    """One answer of a store: at most 1,000 keys, in order."""

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
            return found, None
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
        if cut is None:
            yield self._go_on(keys, page)
            return
        keys.is_probed = False
        if page.entries and page.entries[0][0] <= cut:  # this server does not begin where it is asked to
            self._may_cut = False
        if not self._may_cut or keys.is_done or keys.after >= cut or (keys.until is not None and cut >= keys.until):
            self._num_vain += 1
            return
        behind = _Range(cut, keys.until)
        keys.until = cut  # of a page that is under way, what lies behind it is left out
        self._open.append(behind)
        stretch = self._go_on(behind, page)
        self._num_vain += not stretch.entries
        yield stretch

    def _go_on(self, keys: _Range, page: Page) -> Stretch:
        after, until = keys.after, keys.until
        last = page.entries[-1][0] if page.entries else after
        is_last = page.token is None or (until is not None and last >= until)
        entries = [entry for entry in page.entries if entry[0] > after and (until is None or entry[0] <= until)]
        if is_last:
            keys.is_done = True
            self._open.remove(keys)
            return Stretch(after, until, entries, True)
        keys.after, keys.token = max(after, last), page.token
        keys.shared = _shared(page.entries[0][0], last) if page.entries else -1
        self._open.remove(keys)
        self._waiting.append(keys)
        return Stretch(after, keys.after, entries, False)


def _shared(first: str, last: str) -> int:
    """How many characters two texts begin with that are the same."""
    for place, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return place
    return min(len(first), len(last))


def is_marker(key: str, size_bytes: int | None) -> bool:
    """Whether an object is the marker of an empty "folder"."""
    return key.endswith("/") and not size_bytes
