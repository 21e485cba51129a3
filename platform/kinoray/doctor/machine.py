"""Whether a machine can run kinoray: versions, GPUs, decoders that really decode, and room to work in.

What is easy to break: it needs no Ray, and a broken library here is a finding, never an end of the checkup.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kinoray.config.shared import ClipConfig, DecodeConfig, SampleConfig, ViewConfig
from kinoray.console import many
from kinoray.demo.videos import make_video
from kinoray.doctor.config import Check, Section, Status, checked
from kinoray.doctor.host import PACKAGES, host_facts
from kinoray.errors import ConfigError, DecoderStartFailed, MediaError
from kinoray.storage.objects import format_bytes
from kinoray.video.request import Sampled
from kinoray.video.sandbox.jail import SETUID_CAPABILITIES
from kinoray.video.sandbox.pool import Sandbox
from kinoray.video.sandbox.process import start_decoder

__all__ = ["gpu_facts", "host_checks", "jail_checks", "machine_section", "required_versions", "version_checks"]

_EXTRAS = ("torchcodec",)
_NVIDIA = "/proc/driver/nvidia/gpus"

_STORE_SHARE = 0.3  # of the free memory, which Ray's object store takes
_FULL = 0.95  # of a disk, where Ray stops to write
_NEARLY_FULL = 0.9
_ROOM_BYTES = 10e9
_MEMORY_BYTES = 4e9
_OPEN_FILES = 8192

_SIDE_PX = 64
_NUM_FRAMES = 8
_MOST_GREY_LEVELS = 6.0  # that a decoder may be off: neighbouring frames are 25 apart


def machine_section() -> Section:
    """Everything about this machine; takes seconds, since torch is loaded and clips are decoded."""
    facts = host_facts()
    gpus = gpu_facts()
    decoders = [*_decoder_checks(), *jail_checks(_jail_layers())]
    checks = [*version_checks(facts), *_gpu_checks(gpus), *decoders, *host_checks(facts)]
    return checked("machine", checks, **facts, gpus=gpus)


def required_versions() -> dict[str, SpecifierSet]:
    """What kinoray's own package demands of PACKAGES and of python; empty where it was not installed as a package."""
    try:
        package = metadata.metadata("kinoray")
    except metadata.PackageNotFoundError:
        return {}
    found = {"python": SpecifierSet(package["Requires-Python"])}
    for text in package.get_all("Requires-Dist", []):
        requirement = Requirement(text)
        is_wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": name}) for name in _EXTRAS)
        if is_wanted and requirement.name in PACKAGES:
            found[requirement.name] = requirement.specifier
    return found


def version_checks(facts: Mapping[str, Any]) -> Iterator[Check]:
    """Python and the packages against what kinoray demands. `facts` are those of host_facts."""
    required = required_versions()
    if not required:
        yield Check("python", "ok", facts["python"])
        remedy = "pip install kinoray, or pip install --editable . in its sources, to have versions compared"
        yield Check("packages", "warning", "kinoray is not installed here, so no version is compared", remedy)
        return
    wanted = required.pop("python")
    fits = wanted.contains(facts["python"], prereleases=True)
    yield Check("python", "ok" if fits else "wrong", facts["python"], "" if fits else f"install Python {wanted}")
    for name, wanted in required.items():
        found = facts["packages"][name]
        if found is None and name in _EXTRAS:
            yield Check(name, "ok", f"not installed; it is an extra (pip install '{name}{wanted}')")
        elif found is None:
            yield Check(name, "wrong", "not installed", f"pip install '{name}{wanted}'")
        elif wanted.contains(found, prereleases=True):
            yield Check(name, "ok", found)
        else:
            status: Status = "warning" if name in _EXTRAS else "wrong"
            yield Check(name, status, f"{found}, which is not {wanted}", f"pip install '{name}{wanted}'")


def gpu_facts() -> dict[str, Any]:
    """What torch says of its GPUs: cuda (version or None), devices, error (why it has none), and driver_gpus."""
    there = Path(_NVIDIA)
    found: dict[str, Any] = {"driver_gpus": len([*there.iterdir()]) if there.is_dir() else 0}
    found |= {"cuda": None, "devices": [], "error": ""}
    try:
        import torch

        found["cuda"] = torch.version.cuda
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            device = {"name": about.name, "memory_bytes": about.total_memory}
            device["sum"] = float(torch.ones(1000, device=f"cuda:{index}").sum())
            found["devices"].append(device)
    except (ImportError, OSError, RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        found["error"] = " ".join(str(error).split())[:200]
    return found


def _gpu_checks(found: Mapping[str, Any]) -> Iterator[Check]:
    devices = found["devices"]
    if found["error"]:
        remedy = "install the torch that fits this machine's driver (pytorch.org), and see that nvidia-smi answers"
        yield Check("gpus", "wrong", f"torch fails: {found['error']}", remedy)
    elif found["driver_gpus"] > len(devices):
        text = f"{many(found['driver_gpus'], 'GPU')} in this machine, {len(devices)} that torch can use"
        remedy = "install a torch with CUDA for this driver, or widen CUDA_VISIBLE_DEVICES; without, models run on CPUs"
        yield Check("gpus", "warning", f"{text} (its CUDA: {found['cuda'] or 'none'})", remedy)
    elif devices:
        names = ", ".join(f"{device['name']} ({format_bytes(device['memory_bytes'])})" for device in devices)
        yield Check("gpus", "ok", f"{names}; CUDA {found['cuda']}; each adds up numbers")
    else:
        yield Check("gpus", "ok", "none; models run on CPUs (--resources.gpus-per-worker 0, the default)")


def _decoder_checks() -> Iterator[Check]:
    """Decode a clip whose frames say by their brightness which ones they are, with each back end."""
    greys = np.linspace(30, 205, _NUM_FRAMES)
    frames = np.broadcast_to(greys[:, None, None, None], (_NUM_FRAMES, _SIDE_PX, _SIDE_PX, 3)).round().astype(np.uint8)
    data = make_video(frames, gop=_NUM_FRAMES)
    for backend in get_args(DecodeConfig.__annotations__["backend"]):
        yield _decoder_check(backend, data, greys)


def _decoder_check(backend: Any, data: bytes, greys: np.ndarray) -> Check:
    name, is_default = f"decoder {backend}", backend == DecodeConfig().backend
    clip = ClipConfig(
        sample=SampleConfig(num_segments=4, frames_per_segment=1),
        view=ViewConfig(resize_px=_SIDE_PX, crop_px=_SIDE_PX),
        decode=DecodeConfig(backend=backend),
    )
    remedy = "pip install --force-reinstall av" if is_default else "leave --clip.decode.backend at pyav"
    try:
        with Sandbox(1) as sandbox:
            found = sandbox.decode(data, Sampled(), clip.without_flow()).clip()
    except ConfigError as error:
        if find_spec("av" if is_default else backend) is None:
            return Check(name, "ok", f"not here; the default does not need it ({str(error).partition(';')[0]})")
        return Check(name, "warning", str(error), remedy)
    except (MediaError, DecoderStartFailed) as error:
        text = f"{type(error).__name__}: {error}"
        return Check(name, "wrong" if is_default else "warning", text, remedy)
    seen, wanted = found.frames.reshape(4, -1).mean(axis=1), greys[found.indices.reshape(-1)]
    worst = float(np.abs(seen - wanted).max())
    if worst > _MOST_GREY_LEVELS:
        text = f"frames of a test clip are off by {worst:.0f} grey levels: they are others, or their colours are wrong"
        return Check(name, "wrong" if is_default else "warning", text, remedy)
    return Check(name, "ok", f"4 frames of a test clip, at most {worst:.1f} grey levels off")


_LAYERS = {
    "system calls": "system calls are filtered",
    "network": "a network namespace of its own",
    "files": "Landlock",
    "root folder": "an empty root folder",
    "user": "not root",
    "capabilities": "no capabilities",
}
_SECCOMP = "a kernel, or a container's profile, that allows seccomp"


def _jail_layers() -> dict[str, str]:
    """What a decoder process says of its jail; nothing where none can start, which the checks of the decoders tell."""
    try:
        process = start_decoder(DecodeConfig())
    except DecoderStartFailed:
        return {}
    process.kill()
    return process.layers


def jail_checks(layers: Mapping[str, str]) -> Iterator[Check]:
    """What a decoder process cannot reach, and which layers hold that. `layers` are a DecoderProcess's."""
    if layers:
        remedy = f"{_SECCOMP} or user namespaces (sysctl user.max_user_namespaces)"
        yield _jail_check("network", "none", "it could use it", any, ("system calls", "network"), layers, remedy)
        remedy = f"{_SECCOMP}, Landlock (Linux 5.13) or user namespaces"
        names = ("system calls", "files", "root folder")
        yield _jail_check("files", "none", "it could open those of its user", any, names, layers, remedy)
        text = "it could start some, and reach its user's processes"
        yield _jail_check("programs", "none, and no other processes", text, any, ("system calls",), layers, _SECCOMP)
        remedy = f"run as another user, or leave the container its {', '.join(SETUID_CAPABILITIES)}"
        yield _jail_check("rights", "none", "more than it needs", all, ("user", "capabilities"), layers, remedy)


def _jail_check(
    what: str,
    held: str,
    lost: str,
    enough: Callable[[Iterable[bool]], bool],
    names: tuple[str, ...],
    layers: Mapping[str, str],
    remedy: str,
) -> Check:
    reasons = [layers[name] for name in names if layers[name]]
    if not enough(not layers[name] for name in names):
        return Check(f"decoder's {what}", "warning", f"{lost} ({'; '.join(reasons)})", remedy)
    there = [_LAYERS[name] for name in names if not layers[name]]
    absent = [f"not: {_LAYERS[name]}, {layers[name]}" for name in names if layers[name]]
    return Check(f"decoder's {what}", "ok", f"{held} ({'; '.join([*there, *absent])})")


def host_checks(facts: Mapping[str, Any]) -> list[Check]:
    """Cores, memory, shared memory, disk and open files.

    Args:
        facts: those of host_facts; with `object_store_bytes`, where a Ray runs that has its object store already.
    """
    return [_cores(facts), _memory(facts), _shared_memory(facts), _disk(facts["ray_folder"]), _open_files(facts)]


def _cores(facts: Mapping[str, Any]) -> Check:
    cores, quota = facts["cores"], facts["cpu_quota"]
    if quota is not None and quota < cores:
        text = f"{cores}, of which the container may keep {quota:g} busy"
        remedy = f"start Ray with --num-cpus={max(1, int(quota))}, or raise the container's limit"
        return Check("cores", "ok" if quota > cores - 1 else "warning", text, remedy if quota <= cores - 1 else "")
    return Check("cores", "ok", f"{cores}")


def _memory(facts: Mapping[str, Any]) -> Check:
    total, limit = facts["memory_bytes"], facts["memory_limit_bytes"]
    text = f"{format_bytes(total)}, {format_bytes(facts['memory_free_bytes'])} free"
    if limit is not None and limit < total:
        text += f", {format_bytes(limit)} allowed here"
    if min(total, limit or total) < _MEMORY_BYTES:
        remedy = f"Ray, a worker and two decoders want {format_bytes(_MEMORY_BYTES)}; use a larger machine or limit"
        return Check("memory", "warning", text, remedy)
    return Check("memory", "ok", text)


def _shared_memory(facts: Mapping[str, Any]) -> Check:
    space, name = facts["shared_memory"], "shared memory"
    free = min(facts["memory_free_bytes"], facts["memory_limit_bytes"] or facts["memory_free_bytes"])
    running = facts.get("object_store_bytes")
    store = running or _STORE_SHARE * free
    remedy = f"give the container --shm-size={max(1, round(1.1 * store / 2**30))}g (Kubernetes: an emptyDir of Memory)"
    if space is None:
        return Check(name, "warning", "there is no /dev/shm: Ray's object store goes to a disk", remedy)
    room = space["size_bytes"] if running else space["free_bytes"]
    text = f"/dev/shm has {format_bytes(space['size_bytes'])}, {format_bytes(space['free_bytes'])} free; "
    if room < store:
        return Check(name, "warning", f"{text}too little for Ray's object store of {format_bytes(store)}", remedy)
    return Check(name, "ok", f"{text}{format_bytes(room - store)} beside Ray's object store of {format_bytes(store)}")


def _disk(space: Mapping[str, Any]) -> Check:
    name, path, size, free = "disk", space["path"], space["size_bytes"], space["free_bytes"]
    text = f"{format_bytes(free)} of {format_bytes(size)} free for Ray's temporary files in {path}"
    used = 1 - free / size if size else 1.0
    remedy = "delete old session_* folders there, or let RAY_TMPDIR (ray start --temp-dir) name a larger disk"
    if used > _FULL:
        return Check(name, "wrong", f"{text}; Ray writes nothing to a disk that is {used:.0%} full", remedy)
    few = used > _NEARLY_FULL or free < _ROOM_BYTES
    return Check(name, "warning" if few else "ok", text, remedy if few else "")


def _open_files(facts: Mapping[str, Any]) -> Check:
    soft, hard = facts["open_files"]["soft"], facts["open_files"]["hard"]
    if hard < 0:
        return Check("open files", "ok", "no limit")
    few = hard < _OPEN_FILES
    remedy = "raise the hard limit (ulimit -Hn 65536, or LimitNOFILE= of the service)" if few else ""
    return Check("open files", "warning" if few else "ok", f"{soft:,} allowed, up to {hard:,} at request", remedy)
