"""The rules of the tree: where imports may point, what is public, how long a job may be."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KINORAY = ROOT / "platform" / "kinoray"

# The rooms, in the order of house and pipeline: each may import only from those before it, and from itself.
ROOMS = [
    "errors",
    "console",
    "config",
    "storage",
    "page",
    "catalog",
    "video",
    "network",
    "cluster",
    "label",
    "pack",
    "evaluation",
    "train",
    "tune",
    "library",
    "capacity",
    "demo",
    "doctor",
    "api",
    "cli",
    "__main__",
]

# Who may import ray, besides cluster/, and why.
ON_RAY = {
    "capacity/job.py",  # the workers that a plan measures with
    "doctor/host.py",  # a look at each node, run as a job
    "label/job.py",  # the workers of a labelling
    "label/times.py",  # counters that Ray exports
    "pack/job.py",  # the tasks of a packing
    "train/input.py",  # the stream of clips is Ray Data's
    "train/job.py",  # the workers of a training, under Ray Train, and what a sweep and its trials meet at
    "train/recorder.py",  # counters that Ray exports
    "tune/job.py",  # a trial is a Trainable of Ray Tune, and the searchers and schedulers are its own
    "tune/verb.py",  # the sweep under Ray Tune
}


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(KINORAY.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in python_files(KINORAY)}


def imported_modules(path: Path) -> set[str]:
    """Every module that the file imports, also inside functions, and those of ours that it names in a string."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names if f"{module}.{alias.name}" in MODULES)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = node.value.partition(":")[0]
            if named in MODULES and named != "kinoray":
                found.add(named)
    return found


def room_of(module: str) -> int:
    """`kinoray.video.pyav` -> the place of `video`: the modules of a folder share its room."""
    name = module.split(".")[1]
    assert name in ROOMS, f"{module} has no place in ROOMS: add it there, and say where it belongs"
    return ROOMS.index(name)


def test_platform_is_not_a_package() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    code = "import platform, torch; assert hasattr(platform, 'system'), platform"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_no_module_in_a_source_root_shadows_the_standard_library() -> None:
    for root in ("platform", "models"):
        names = {path.stem for path in (ROOT / root).iterdir()}
        assert not names & set(sys.stdlib_module_names)


def test_imports_point_down() -> None:
    wrong = [
        f"{module} -> {imported}"
        for module, path in MODULES.items()
        if module != "kinoray"
        for imported in imported_modules(path)
        if imported.startswith("kinoray.") and room_of(imported) > room_of(module)
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    imports = {
        module: {name for name in imported_modules(path) if name in MODULES and name not in ("kinoray", module)}
        for module, path in MODULES.items()
    }
    while imports:
        free = {module for module, names in imports.items() if not names & imports.keys()}
        assert free, f"each of these needs another one of them first: {sorted(imports)}"
        imports = {module: names for module, names in imports.items() if module not in free}


def test_folders_run_nothing_on_import() -> None:
    """So that importing one module of a folder imports no other: decoders need no torch, workers no driver.

    Except network/, which is what networks import: it imports nothing of ours itself.
    """
    for path in python_files(KINORAY):
        if path == KINORAY / "network" / "__init__.py":
            assert not {name for name in imported_modules(path) if name.split(".")[0] == "kinoray"}
        elif path.name == "__init__.py" and path.parent != KINORAY:
            (docstring,) = ast.parse(path.read_text(encoding="utf-8")).body
            assert isinstance(docstring, ast.Expr), path


def test_only_listed_files_import_ray() -> None:
    importing = set()
    for path in python_files(KINORAY):
        if "ray" in {name.split(".")[0] for name in imported_modules(path)}:
            importing.add(str(path.relative_to(KINORAY)))
    assert {name for name in importing if not name.startswith("cluster/")} == ON_RAY


def test_the_platform_never_imports_a_model() -> None:
    for path in python_files(KINORAY):
        roots = {name.split(".")[0] for name in imported_modules(path)}
        assert not roots & {"vcm_sdd", "video_baselines"}, path
        if path.name not in ("build.py", "resolve.py"):  # the tables of readers and of short names
            named = re.findall(r"""["'](?:vcm_sdd|video_baselines)[.:]\w+""", path.read_text(encoding="utf-8"))
            assert not named, path


def test_models_import_torch_and_torchvision_only() -> None:
    """And what kinoray.network says of networks, nothing else of the platform."""
    ours = {"vcm_sdd", "video_baselines"}
    allowed = (
        {"torch", "torchvision", "timm", "transformers", "tokenizers", "huggingface_hub", "safetensors"}
        | ours
        | sys.stdlib_module_names
    )
    for path in python_files(ROOT / "models"):
        imported = imported_modules(path) - {"kinoray.network"}
        roots = {name.split(".")[0] for name in imported}
        assert roots <= allowed, f"{path} imports {roots - allowed}"


def test_what_a_network_imports_of_the_platform_imports_nothing_else() -> None:
    """So it costs a user's network nothing, and cannot run into an import of itself."""
    code = "import sys; before = set(sys.modules); import kinoray.network; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    imported = set(done.stdout.split())
    assert {name for name in imported if name.startswith("kinoray")} == {
        "kinoray",
        "kinoray.label",  # two empty folders, which the package makes callable
        "kinoray.network",
        "kinoray.train",
    }
    assert not imported & {"torch", "ray", "pyarrow", "cv2", "tyro"}


def test_decoding_needs_neither_torch_nor_ray() -> None:
    code = "import sys, kinoray.video.frames; bad = {'torch', 'ray'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def modules_with_public_names() -> list[str]:
    names = []
    for package in ("kinoray", "vcm_sdd", "video_baselines"):
        imported = importlib.import_module(package)
        names.append(package)
        names.extend(info.name for info in pkgutil.walk_packages(imported.__path__, f"{package}."))
    return names


@pytest.mark.parametrize("name", modules_with_public_names())
def test_public_names_equal_all(name: str) -> None:
    """Every name that is defined in a module without an underscore is in __all__, and nothing else is."""
    module = importlib.import_module(name)
    tree = ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))
    defined: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
    public = {item for item in defined if not item.startswith("_")}
    exported = set(getattr(module, "__all__", ()))
    assert not {item for item in exported if not hasattr(module, item)}
    assert public <= exported, f"public but not in __all__: {sorted(public - exported)}"


def test_jobs_are_thin() -> None:
    jobs = python_files(ROOT / "jobs")
    assert {path.stem for path in jobs} >= {"pack", "train", "evaluate", "label"}
    for path in jobs:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 120, path


@pytest.mark.parametrize("folder", ["platform/kinoray", "models", "jobs"])
def test_modules_fit_in_a_head(folder: str) -> None:
    for path in python_files(ROOT / folder):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        assert len(lines) <= 400, f"{path} has {len(lines)} lines"


def test_sources_are_ascii() -> None:
    for folder in ("platform", "models", "jobs", "benchmarks"):
        for path in python_files(ROOT / folder):
            text = path.read_text(encoding="utf-8")
            odd = {char for char in text if ord(char) > 127}
            assert not odd, f"{path}: {odd}"


def test_constraints_hold_names_and_versions_only() -> None:
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert line.startswith("#") or (line.count("==") == 1 and "/" not in line and "@" not in line), line


LIGHT = """
import importlib, sys
from kinoray.config.shared import ModelConfig
from kinoray.network.build import build_model, build_outline
for name in ("vcm_sdd", "r3d_18"):
    build_outline(ModelConfig(factory=name), 5)
    build_model(ModelConfig(factory=name), 5)
assert not {name for name in sys.modules if name.startswith("torch._dynamo")}
from torchvision.ops import roi_align
theirs = importlib.import_module("torch._dynamo.utils").is_compile_supported
assert sys.modules[roi_align.__module__].is_compile_supported("cpu") == theirs("cpu")
"""


def test_a_network_is_made_without_what_compiles_it() -> None:
    """torch._dynamo takes each process that loads a network 2 s of CPU; torchvision has it when it asks."""
    subprocess.run([sys.executable, "-c", LIGHT], check=True)


@pytest.mark.parametrize(
    "verb",
    ["label", "evaluate", "calibrate", "bench", "doctor", "pack", "report", "compare", "export", "train", "tune"],
)
def test_limits_of_decoding_are_flags_of_every_verb_that_decodes(verb: str) -> None:
    from kinoray.cli import VERBS
    from kinoray.config.help import verb_help

    text = verb_help(f"kinoray {verb}", VERBS[verb].config(), (), "", every=True)
    assert re.search(r"--(\w+\.)*decode\.max-pixels", text)
