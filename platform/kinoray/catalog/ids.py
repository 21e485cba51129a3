"""What a video is called in a catalog: a key that is made of its name, and is nobody else's.

What is easy to break: names are strangers', and may be chosen so that what becomes of them is equal. Which ids come out
depends on the set of the names alone, and not on their order.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

__all__ = ["MAX_ID_LEVEL", "id_at", "unique_ids"]

_MAX_ID_BYTES = 180  # leaves room for an extension in the 255 bytes of a file name
_MAX_ID_CHARS = 1024  # that are looked at for it, and become more than those bytes: accents in a row take long
_DIGEST_CHARS = (0, 10, 64)  # of a name's SHA-256 in its video_id: none, enough against chance, enough against intent
MAX_ID_LEVEL = len(_DIGEST_CHARS) - 1


def unique_ids(names: Sequence[str]) -> list[str]:
    """A video_id for each (unique) name: the path without its extension, in letters, digits, `_` and `-`.

    `bus/a.b.mp4` -> `bus__a_b`: a key that every WebDataset reader splits at the same dot. Names that come out equal,
    or too long, all get a digest of the name at the end, whatever their order; a whole one where names were chosen so
    that they come out equal all the same.
    """
    plain = [_sanitise(name) for name in names]
    lengths = [int(len(video_id.encode()) > _MAX_ID_BYTES) for video_id in plain]  # places in _DIGEST_CHARS
    ids = list(map(_with_digest, plain, names, lengths))
    while True:
        counts = Counter(ids)
        equal = [place for place, video_id in enumerate(ids) if counts[video_id] > 1]
        longer = [place for place in equal if lengths[place] < MAX_ID_LEVEL]
        if not longer:
            return ids
        for place in longer:
            lengths[place] += 1
            ids[place] = _with_digest(plain[place], names[place], lengths[place])


def id_at(name: str, level: int) -> tuple[str, int]:
    """The video_id of a name that `level` rounds of `unique_ids` found equal to another one, and what level that is.

    It is 1 at least for a long name, and at most MAX_ID_LEVEL.
    """
    plain = _sanitise(name)
    level = max(level, int(len(plain.encode()) > _MAX_ID_BYTES))
    return _with_digest(plain, name, level), level


def _sanitise(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    stem = base.rpartition(".")[0] or base
    text = unicodedata.normalize("NFC", f"{folder}{slash}{stem}"[:_MAX_ID_CHARS])
    return re.sub(r"[^\w-]", "_", text.replace("/", "__"))


def _with_digest(video_id: str, name: str, length: int) -> str:
    """The id with so much of the name's digest (a place in _DIGEST_CHARS), cut to leave room for it."""
    num_chars = _DIGEST_CHARS[length]
    if not num_chars:
        return video_id
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:num_chars]
    room_bytes = _MAX_ID_BYTES + _DIGEST_CHARS[1] - num_chars
    return f"{video_id.encode()[:room_bytes].decode(errors='ignore')}-{digest}"
