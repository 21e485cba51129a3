"""What a submitted job is made of: a folder with the code and job.yaml, the command, and nothing else.

The folder is built of what is named, not of a checkout less what is excluded: a file that nobody thought of (a key, a
data set) is not in it. Easy to break: all of this can be read by whoever may list the cluster's jobs.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kinoray import __version__
from kinoray.cluster.config import SubmitConfig
from kinoray.config.shared import digest
from kinoray.config.yaml_text import parse_yaml
from kinoray.errors import ConfigError
from kinoray.network.resolve import is_published

__all__ = ["build_folder", "check_settings", "entrypoint", "metadata", "read_settings", "runtime_env"]

_PAYLOAD = "job.yaml"
_PLACES = {"kinoray": "platform", "vcm_sdd": "models", "video_baselines": "models"}
_OWN = "packages"
_SUFFIXES = (".py", ".typed", ".html", ".css", ".js", ".j2")  # of what we send ourselves
_LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*", "*.pem", "*.key", "*.egg-info")
_MAX_BYTES = 80 * 2**20  # Ray's dashboard takes 100 MiB, zipped
_SHARED = ("source", "catalog", "checkpoint", "out", "init_from", "calibration", "label_names", "annotations", "doc")
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN")
_MIN_SECRET = 12  # characters; a shorter one is no secret and may be a word
_SIGNED = re.compile(r"[?&](X-Amz-Signature|X-Amz-Credential|Signature|AWSAccessKeyId)=", re.IGNORECASE)


def read_settings(config: SubmitConfig) -> dict[str, Any]:
    """The verb's config as a mapping."""
    content = parse_yaml(config.settings, "settings")
    if not isinstance(content, dict):
        raise ConfigError(f"settings must be the config of {config.verb} as YAML; give its flags after `--`")
    return content


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what would go wrong on another machine, or would show a secret to all who see the cluster's jobs.

    Raises:
        ConfigError: naming the field, never its value where that is the secret.
    """
    for name in _SHARED:
        values = settings.get(name) or ()
        for value in (values,) if isinstance(values, str) else values:
            if "://" not in value and not os.path.isabs(value):
                is_network = name in ("checkpoint", "init_from") and is_published(value)
                own = f"; kinoray import {value} --out s3://BUCKET/NAME puts it there" if is_network else ""
                place = "s3:// or an absolute folder that all nodes share when submitted"
                raise ConfigError(f"{name} must be {place}, got {value!r}{own}")
    address = settings.get("resources", {}).get("address")
    if address:
        raise ConfigError(f"resources.address must be left out: the job joins the cluster it runs on, got {address!r}")
    secrets = [value for name in _SECRETS if len(value := os.environ.get(name, "")) >= _MIN_SECRET]
    for name, value in _texts(settings):
        holds = any(secret in value for secret in secrets) or bool(_SIGNED.search(value))
        if holds or ("://" in value and "@" in urlsplit(value).netloc):
            raise ConfigError(
                f"{name} holds a credential, which all who see the cluster's jobs could read; take it out, and give "
                "the nodes an instance role, or AWS variables in the environment of `ray start`"
            )


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a tree, and its dotted name."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{name}.{key}" if name else str(key))
            yield name, str(key)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _texts(item, f"{name}[{index}]")


def build_folder(folder: Path, config: SubmitConfig) -> None:
    """Fill an empty folder: platform/, models/, packages/ (the user's own) and job.yaml.

    Raises:
        ConfigError: a folder of --code is not there, or it is too much to send.
    """
    for package, place in _PLACES.items():
        spec = find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            _copy_package(Path(spec.submodule_search_locations[0]), folder / place / package)
    for index, item in enumerate(config.code):
        _copy_own(Path(item).expanduser(), folder / _OWN, f"code[{index}]")
    (folder / _PAYLOAD).write_text(config.settings, encoding="utf-8")
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size_bytes > _MAX_BYTES:
        raise ConfigError(
            f"code must be at most {_MAX_BYTES >> 20} MiB, found {size_bytes >> 20} MiB; data and weights belong into "
            "object storage"
        )


def _copy_package(source: Path, target: Path) -> None:
    """Our own package: sources and templates, whatever else lies beside them."""
    for path in sorted(source.rglob("*")):
        if path.suffix in _SUFFIXES and path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def _copy_own(source: Path, target: Path, name: str) -> None:
    """A package of the user's, under its own name; hidden files and keys stay here."""
    if not source.is_dir():
        raise ConfigError(f"{name} must be a folder with a Python package, got {str(source)!r}")
    place = target / source.resolve().name
    if place.exists():
        raise ConfigError(f"{name} must have another name than the other packages that are sent, got {str(source)!r}")
    shutil.copytree(source, place, ignore=_LEFT_OUT)


def runtime_env(folder: Path) -> dict[str, Any]:
    """What Ray is told of the job's environment: the code and where it is."""
    path = os.pathsep.join(["platform", "models", _OWN])
    return {"working_dir": str(folder), "env_vars": {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}}


def entrypoint(config: SubmitConfig) -> str:
    """The job's command."""
    return f"python -m kinoray.cli {config.verb} --config {_PAYLOAD}"


def metadata(config: SubmitConfig, run: str, number: int) -> dict[str, str]:
    """What the dashboard shows of it, and what tells two submissions with one id apart."""
    settings = read_settings(config)
    return {
        "kinoray_run": run,
        "kinoray_verb": config.verb,
        "kinoray_attempt": str(number),
        "kinoray_out": str(settings.get("out", "")),
        "kinoray_settings": digest(settings),
        "kinoray_version": __version__,
    }
