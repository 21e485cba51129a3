"""How many settings there are: `python tests/count_settings.py`.

A setting is a field of a class named ...Config in platform/kinoray; a setting that several verbs share in one class
counts once, and one that is written in the trees of two verbs counts twice. Below it: the flags of each verb.
"""

import ast
from pathlib import Path

from kinoray.cli import VERBS
from kinoray.config.help import settings_of

KINORAY = Path(__file__).resolve().parents[1] / "platform" / "kinoray"


def settings_by_class() -> dict[str, int]:
    """Fields that each config class declares."""
    found: dict[str, int] = {}
    for path in sorted(KINORAY.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                found[node.name] = sum(isinstance(item, ast.AnnAssign) for item in node.body)
    return found


if __name__ == "__main__":
    counts = settings_by_class()
    for name, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"{count:4} {name}")
    print(f"{sum(counts.values()):4} settings in {len(counts)} classes")
    flags = {name: len(list(settings_of(verb.config()))) for name, verb in VERBS.items()}
    print(f"flags of {len(flags)} verbs: {', '.join(f'{name} {count}' for name, count in flags.items())}")
