"""README.md and docs/*.md as text: blocks are marked, commands of kinoray parse, what is named or linked exists.

test_guides.py runs the blocks that can be run here.
"""

import ast
import contextlib
import dataclasses
import importlib
import io
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from guide_blocks import NOT_RUN, ROOT, commands, fenced, outside, pages, read_page, shell_blocks
from guide_world import small
from kinoray.cli import VERBS, main, parse_settings

LANGUAGES = {"sh", "json", "yaml", "sql", "csv", "text", "python", "mermaid"}
INDENTED = re.compile(r"^ {4,}(?:kinoray|python|pip|make|ray|pytest|source|export|aws|kubectl|docker) ", re.MULTILINE)
NAMED_FILE = re.compile(r"\b(?:benchmarks|deploy|docs|jobs|tests)/[\w./-]+\.\w+")
NAMED_TEST = re.compile(r"\b(tests/test_\w+\.py)::((?:\w+::)?test_\w+)")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
REQUIRED = {"catalog": "set", "source": "videos", "checkpoint": "run", "out": "out"}
"""What a --config file says of what a verb cannot do without."""


@pytest.mark.parametrize("page", pages())
def test_every_block_says_who_runs_it_and_is_shell(page: str) -> None:
    assert {block.language for block in fenced(page)} <= LANGUAGES
    for block in shell_blocks(page):
        assert block.run_by or block.mark in NOT_RUN, f"{page}: a block begins with {block.mark!r}"
        assert not block.run_by or (ROOT / block.run_by).is_file(), block.mark
        subprocess.run(["bash", "-n", "-c", block.text], check=True, timeout=30)
    assert not INDENTED.search(outside(page)), f"{page}: commands outside of a ```sh block"


@pytest.mark.parametrize("page", pages())
def test_every_command_of_kinoray_parses(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need a cloud or hours, too."""
    for block in shell_blocks(page):
        for words in commands(block, "kinoray"):
            parse(words[1], words[2:], tmp_path)
        for words in commands(block, "python"):
            if words[1] == "jobs/ablate.py":
                monkeypatch.syspath_prepend(str(ROOT / "jobs"))
                cls = importlib.import_module("ablate").AblateConfig
                assert parse_settings("ablate", cls, words[2:]) is not None
            elif words[1].startswith("jobs/"):
                parse(Path(words[1]).stem, words[2:], tmp_path)


def parse(verb: str, flags: list[str], folder: Path) -> None:
    """Print the config and stop. What `submit` sends is parsed, too; a --config file is replaced by one that exists."""
    assert verb in VERBS
    own, sent = (flags[: flags.index("--")], flags[flags.index("--") :]) if "--" in flags else (flags, [])
    if "--config" in own:
        fields = {field.name for field in dataclasses.fields(VERBS[verb].config())}
        (folder / "config.yaml").write_text(yaml.safe_dump({key: REQUIRED[key] for key in fields & set(REQUIRED)}))
        own[own.index("--config") + 1] = str(folder / "config.yaml")
    own = [word for word in own if word != "--print-config"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        assert main([verb, *own, "--print-config", *sent]) == 0, f"{verb} {flags}: {said.getvalue()}"
    if sent:
        parse(own[0], sent[1:], folder)


@pytest.mark.parametrize("page", pages())
def test_what_a_page_names_is_there(page: str) -> None:
    text = read_page(page)
    for name in NAMED_FILE.findall(text):
        assert (ROOT / name).exists(), f"{page} names {name}"
    for target in LINK.findall(text):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links {target}"
    for verb in re.findall(r"`kinoray ([a-z]+)\b", text):
        assert verb in {*VERBS, "help", "version"}, f"{page} names the verb {verb}"


def test_every_page_is_in_the_index() -> None:
    linked = {f"docs/{target}" for target in LINK.findall(read_page("docs/README.md"))}
    assert linked == set(pages()) - {"README.md", "docs/README.md"}


def test_what_troubleshooting_says_is_said_by_the_code() -> None:
    """The first cell of each row; what is no text of ours is a program's, and named as such."""
    rows = re.findall(r"^\| (`[^|]+?) \|", read_page("docs/troubleshooting.md"), re.MULTILINE)
    texts = [text for row in rows if (text := row.partition("`")[2].partition("`")[0]) not in ("ray up",)]
    assert len(texts) > 20
    said = "\n".join(text for path in (ROOT / "platform").rglob("*.py") for text in literals(path))
    for text in texts:
        pieces = [re.escape(piece) for piece in text.split("...")]
        assert re.search("[^\n]*".join(pieces).rstrip(), said), text


def literals(path: Path) -> Iterator[str]:
    """Each string of a module as one line, `...` for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.replace("\n", " ")
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values]
            yield "".join(parts).replace("\n", " ")


def test_guarantees_name_tests_that_exist() -> None:
    text = read_page("docs/guarantees.md")
    promises = re.split(r"^## \d+\. ", text, flags=re.MULTILINE)[1:]
    assert len(promises) == 10
    for promise in promises:
        assert NAMED_TEST.search(promise), promise[:60]
        assert "**Not**: " in promise, promise[:60]
        assert "- Figure" in promise, promise[:60]
    for file, name in NAMED_TEST.findall(text):
        assert name in names_in(file), f"{file}::{name}"


def names_in(file: str) -> set[str]:
    """Names of the tests in a file, as pytest has them."""
    found = set()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return found


def test_small_settings_keep_what_the_page_says() -> None:
    options = ["--model.options", "backbone=resnet50", "scale=dim"]
    made = small(["train", "set", *options, "--out", "run"])
    assert made[: len(options) + 4] == ["train", "set", *options, "--out", "run"]
    assert made[-4:] == ["--model.options", "scale=dim", "backbone=tiny", "heads=4"]
    own = ["train", "set", "--out", "run", "--model.factory", "my_package:my_network", "--model.options", "depth=4"]
    assert "backbone=tiny" not in small(own)
    for kept in (["train", "--config", "best.yaml"], ["labels", "labels"], ["export", "labels", "--to", "x"]):
        assert small(kept) == kept
