"""GRID as sets for the study: `python benchmarks/grid.py GRID OUT`, then `python jobs/ablate.py OUT/colour.parquet`.

GRID is a folder with clips of one talker of the GRID corpus (Cooke et al. 2006) and labels.csv, whose columns are path
and six words. The mouth is cut out by one box for all clips, encoded again (H.264, crf 18, a key frame every 12
frames) and packed to OUT/six, a set whose videos have six labels each (`colour blue`). OUT/WORD.parquet are catalogs of
the same videos with one of the words as their class, so that runs on all of them share their caches. A clip is of val
where the first byte of the SHA-256 of its file's name, modulo 5, is 0: 208 of talker 1's 1,000 clips.
"""

import argparse
import csv
import hashlib
import sys
from pathlib import Path

import av
import numpy as np
import pyarrow as pa

from kinoray.catalog.table import CATALOG_SCHEMA, Catalog, load_catalog, save_catalog
from kinoray.pack.config import PackConfig
from kinoray.pack.verb import pack
from kinoray.storage.objects import Storage

LEFT, TOP, WIDTH, HEIGHT = 112, 184, 96, 72
"""The box of the mouth in frames of 360 x 288, in pixels."""
WORDS = ("command", "colour", "preposition", "letter", "digit", "adverb")
FPS = 25


def split_of(name: str) -> str:
    """train or val, by the file's name alone."""
    return "train" if hashlib.sha256(name.encode()).digest()[0] % 5 else "val"


def cut_mouth(source: Path, target: Path) -> None:
    """Write the mouth's box of a clip; whole or not at all."""
    unfinished = target.with_suffix(".part")
    with av.open(str(source)) as clip, av.open(str(unfinished), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=FPS, options={"crf": "18", "preset": "veryfast", "g": "12"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in clip.decode(video=0):
            image = frame.to_ndarray(format="rgb24")[TOP : TOP + HEIGHT, LEFT : LEFT + WIDTH]
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        out.mux(stream.encode(None))
    unfinished.rename(target)


def of_word(six: Catalog, word: str) -> Catalog:
    """The catalog with what follows `word ` in the labels as the class of each video."""
    found = [
        next(name for name in names if name.startswith(f"{word} ")).removeprefix(f"{word} ")
        for names in six.class_names()
    ]
    labels = tuple(sorted(set(found)))
    columns = {name: six.table.column(name) for name in CATALOG_SCHEMA.names}
    columns["label"] = pa.array(found, pa.string())
    columns["label_id"] = pa.array([labels.index(name) for name in found], pa.int32())
    columns["label_ids"] = pa.nulls(len(six), CATALOG_SCHEMA.field("label_ids").type)
    return Catalog(pa.table(columns, schema=CATALOG_SCHEMA), labels)


def main() -> int:
    """Cut what is missing, pack it, write a catalog for each word."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="the corpus: clips and labels.csv")
    parser.add_argument("out", type=Path, help="folder for the mouths, the set and the catalogs")
    arguments = parser.parse_args()
    rows = list(csv.DictReader((arguments.grid / "labels.csv").open(encoding="utf-8")))
    (arguments.out / "mouths").mkdir(parents=True, exist_ok=True)
    lines = ["path,labels,split"]
    for row in rows:
        target = arguments.out / "mouths" / row["path"]
        if not target.exists():
            cut_mouth(arguments.grid / row["path"], target)
        labels = "|".join(f"{word} {row[word]}" for word in WORDS)
        lines.append(f"mouths/{row['path']},{labels},{split_of(row['path'])}")
    (arguments.out / "six.csv").write_text("\n".join([*lines, ""]), encoding="utf-8")
    pack(PackConfig(source=str(arguments.out / "six.csv"), out=str(arguments.out / "six")))
    storage = Storage()
    six = load_catalog(storage, str(arguments.out / "six"))
    for word in WORDS:
        save_catalog(storage, str(arguments.out / f"{word}.parquet"), of_word(six, word))
    print(f"{arguments.out / 'six'}, and {', '.join(f'{word}.parquet' for word in WORDS)} beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
