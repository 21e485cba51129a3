"""What FiftyOne, Label Studio and Datumaro take in, written as a stream: one entry for each labelled video.

What is easy to break: every file has to end well-formed however many entries there were, none too; and names of
classes come from strangers, so they are data in the XML, too.
"""

import json
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from kinoray.console import visible
from kinoray.errors import ConfigError
from kinoray.library.rows import BAD_VIDEO
from kinoray.storage.objects import is_s3

__all__ = ["Answers", "Datumaro", "FiftyOne", "Format", "LabelStudio"]

Answers = list[tuple[str, float]]
"""(class, score) of a video: one, or any number where the network was trained so."""

_DATUMARO_VIDEO = 5  # datumaro.components.media.MediaType.VIDEO


class Format(Protocol):
    """Writes one tool's files."""

    videos: Path
    """Where copies of videos belong."""

    def add(self, row: dict[str, Any], answers: Answers, place: str | Path) -> None:
        """One labelled row, what is said of it, and its video: an address, or a path below `videos`."""

    def close(self) -> None:
        """End all files."""


class _JsonList:
    """A JSON file with one long list in it, an item a line."""

    def __init__(self, path: Path, head: str, tail: str) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._file.write(head)
        self._tail, self._between = tail, "\n"

    def add(self, item: dict[str, Any]) -> None:
        self._file.write(self._between + json.dumps(item))
        self._between = ",\n"

    def close(self) -> None:
        self._file.write(f"\n{self._tail}\n")
        self._file.close()


class FiftyOne:
    """`FiftyOneDataset` in the form without a version, which every FiftyOne migrates to its own when it loads it.

    Fields of a sample: prediction (Classification with confidence; Classifications where there may be several),
    video_id, row_key, margin, entropy.
    """

    def __init__(self, folder: Path, labels: tuple[str, ...], about: dict[str, Any]) -> None:
        self.folder, self.videos, self._several = folder, folder / "data", bool(about["multi_label"])
        metadata = {"media_type": "video", "default_classes": list(labels), "info": {**about, "classes": list(labels)}}
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
        (folder / "frames").mkdir(exist_ok=True)
        (folder / "frames" / "none.json").write_text('{"frames": {}}', encoding="utf-8")
        self._samples = _JsonList(folder / "samples.json", '{"samples": [', "]}")

    def add(self, row: dict[str, Any], answers: Answers, place: str | Path) -> None:
        """A sample; a copied video is named relative to the folder."""
        said: list[dict[str, Any]] = [
            {"_cls": "Classification", "tags": [], "label": name, "confidence": score} for name, score in answers
        ]
        first = said[0] if said else None
        prediction = {"_cls": "Classifications", "classifications": said} if self._several else first
        self._samples.add(
            {
                "filepath": str(place.relative_to(self.folder)) if isinstance(place, Path) else place,
                "tags": [],
                "metadata": None,
                "frames": "frames/none.json",
                "prediction": prediction,
                **{name: row[name] for name in ("video_id", "row_key", "margin", "entropy")},
            }
        )

    def close(self) -> None:
        """End samples.json."""
        self._samples.close()


class LabelStudio:
    """tasks.json with a prediction each, and labeling-config.xml: a video and one choice called `label`.

    What Label Studio exports as CSV has the columns row_key and label, which `kinoray correct` reads.
    """

    def __init__(self, folder: Path, labels: tuple[str, ...], about: dict[str, Any]) -> None:
        self.folder, self.videos, self._version = folder, folder / "videos", str(about["model_digest"])
        kind = "multiple" if about["multi_label"] else "single"
        config = [
            "<View>",
            '  <Video name="video" value="$video"/>',
            f'  <Choices name="label" toName="video" choice="{kind}" showInline="true">',
            *(f"    <Choice value={quoteattr(visible(name))}/>" for name in (*labels, BAD_VIDEO)),
            "  </Choices>",
            "</View>",
        ]
        (folder / "labeling-config.xml").write_text("\n".join(config) + "\n", encoding="utf-8")
        self._tasks = _JsonList(folder / "tasks.json", "[", "]")

    def add(self, row: dict[str, Any], answers: Answers, place: str | Path) -> None:
        """A task; local files are named as Label Studio serves them, relative to its document root."""
        result = {
            "id": row["row_key"],
            "from_name": "label",
            "to_name": "video",
            "type": "choices",
            "value": {"choices": [visible(name) for name, _ in answers]},
        }
        data = {"video": self._url(place), "video_id": row["video_id"], "row_key": row["row_key"]}
        data |= {"uri": row["uri"], "predicted": ", ".join(name for name, _ in answers)}
        prediction = {"model_version": self._version, "score": answers[0][1] if answers else 0.0, "result": [result]}
        self._tasks.add({"data": data, "predictions": [prediction] if answers else []})

    def _url(self, place: str | Path) -> str:
        if isinstance(place, Path):
            return f"/data/local-files/?d={quote(str(place.relative_to(self.folder)))}"
        return place if is_s3(place) else f"/data/local-files/?d={quote(place.lstrip('/'))}"

    def close(self) -> None:
        """End tasks.json."""
        self._tasks.close()


class Datumaro:
    """annotations/default.json of Datumaro's own format 1.0: items of media type video with a label each."""

    def __init__(self, folder: Path, labels: tuple[str, ...], about: dict[str, Any]) -> None:
        self.videos = folder / "videos" / "default"
        self._ids = {name: index for index, name in enumerate(labels)}
        self._seen: set[str] = set()
        names = [{"name": name, "parent": "", "attributes": []} for name in labels]
        head = {
            "dm_format_version": "1.0",
            "media_type": _DATUMARO_VIDEO,
            "infos": about,
            "categories": {"label": {"labels": names, "label_groups": [], "attributes": []}},
        }
        (folder / "annotations").mkdir(exist_ok=True)
        opening = json.dumps(head).removesuffix("}") + ', "items": ['
        self._items = _JsonList(folder / "annotations" / "default.json", opening, "]}")

    def add(self, row: dict[str, Any], answers: Answers, place: str | Path) -> None:
        """An item; ids are those of the videos (two catalogs may share one: then the row's key is added)."""
        item_id = row["video_id"] if row["video_id"] not in self._seen else f"{row['video_id']}-{row['row_key']}"
        self._seen.add(item_id)
        if unknown := [name for name, _ in answers if name not in self._ids]:
            raise ConfigError(
                f"predictions: {row['video_id']} has the class {unknown[0]!r}, which job.json does not name; they are "
                "not of one labelling"
            )
        said = [
            {"id": index, "type": "label", "attributes": {"score": score}, "group": 0, "label_id": self._ids[name]}
            for index, (name, score) in enumerate(answers)
        ]
        video = {"path": place.name if isinstance(place, Path) else place, "step": 1, "start_frame": 0}
        attr = {"row_key": row["row_key"], "uri": row["uri"], "margin": row["margin"]}
        self._items.add({"id": item_id, "annotations": said, "attr": attr, "video": video})

    def close(self) -> None:
        """End default.json."""
        self._items.close()
