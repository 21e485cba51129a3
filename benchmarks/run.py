"""Run benchmarks and refresh their sections of docs/benchmarks.md: `python benchmarks/run.py [--quick] [NAME ...]`.

Each benchmarks/NAME.py prints a table and ends with one JSON object: its ratios, each beside its bar, and "ok".
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
_PROGRESS = re.compile(
    r"pack: |\w+: ([\d,]+/[\d,]+ |[\d,]+ videos, |[\d,]+ inputs |summary in |with \d+ clips )|\[.* core_worker\.cc"
)


def machine() -> str:
    """One line about what the figures were taken on."""
    model = "unknown CPU"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "av"))
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}"


def run_one(script: Path, quick: bool) -> dict[str, Any]:
    """Run a benchmark; its JSON line, with the text it printed under `text`."""
    command = [sys.executable, str(script), *(["--quick"] if quick else [])]
    print(f"== {script.stem}", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    lines = [line for line in done.stdout.splitlines() if line.strip() and not _PROGRESS.match(line)]
    try:
        result = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        result = {"ok": False, "error": f"exit code {done.returncode}, no JSON line"}
    return {**result, "text": "\n".join(lines[:-1])}


def section(name: str, result: dict[str, Any]) -> str:
    """A benchmark's part of the page."""
    figures = {key: value for key, value in result.items() if key != "text"}
    missed = result.get("verdict", "a bar was missed (see the figures)")
    verdict = "every bar met" if result.get("ok") else missed
    when = datetime.now(UTC).date().isoformat()
    return (
        f"## {name}\n\n`python benchmarks/{name}.py`: {verdict}.\n{when}, {machine()}.\n\n"
        f"```text\n{result['text']}\n```\n\n```json\n{json.dumps(figures, indent=2)}\n```\n"
    )


def refreshed(page: str, parts: dict[str, str]) -> str:
    """The page with these sections in place of the older ones of the same name; the others stay."""
    _, *old = page.split("\n## ")
    sections = {text.split("\n", 1)[0]: f"## {text.rstrip()}\n" for text in old} | parts
    head = "# Benchmarks\n\nWritten by `make bench`. Read the ratios: absolute times are those of one machine.\n"
    return "\n".join([head, *(sections[name] for name in sorted(sections))])


def main() -> int:
    """Run the benchmarks named (default: all) and write their sections of the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument(
        "--quick", action="store_true", help="fewer repeats, for a look: rougher figures, the page stays as it is"
    )
    arguments = parser.parse_args()
    scripts = sorted(path for path in HERE.glob("*.py") if path.stem != "run")
    known = [script.stem for script in scripts]
    unknown = set(arguments.names) - set(known)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    chosen = [script for script in scripts if not arguments.names or script.stem in arguments.names]
    results = {script.stem: run_one(script, arguments.quick) for script in chosen}
    if not arguments.quick:
        old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        parts = {name: section(name, result) for name, result in results.items()}
        PAGE.write_text(refreshed(old, parts), encoding="utf-8")
        print(f"wrote {PAGE.relative_to(HERE.parent)}")
    return 0 if all(result.get("ok", False) is not False for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
