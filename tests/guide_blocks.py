"""The shell blocks of README.md and docs/*.md: where they are, who runs them by their first line, and their commands.

Easy to break: what is not fenced as `sh` is not seen here, so pages must not show commands in any other way.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN_BY = re.compile(r"# run by (tests/test_\w+\.py)")
NOT_RUN = ("# needs a cloud", "# needs the internet", "# needs a GPU", "# takes hours", "# measured by hand")

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.DOTALL | re.MULTILINE)
_ENDS_COMMAND = re.compile(r"[;&|()]+")
_ASSIGNMENT = re.compile(r"\w+=.*")
_REDIRECTS = re.compile(r"[<>]+")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    page: str
    """The page's path in the repository."""
    language: str
    """What stands behind the fence."""
    text: str
    """Its lines, without the fence's indentation."""

    @property
    def mark(self) -> str:
        """Its first line."""
        return self.text.partition("\n")[0]

    @property
    def run_by(self) -> str:
        """The test file that runs it; "" for none."""
        found = RUN_BY.fullmatch(self.mark)
        return found[1] if found else ""

    @property
    def script(self) -> str:
        """What is behind the first line."""
        return self.text.partition("\n")[2]


def pages() -> list[str]:
    """README.md and every page of docs/."""
    return ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def read_page(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fenced(page: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    return [
        Block(page, language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE))
        for indent, language, text in _FENCE.findall(read_page(page))
    ]


def outside(page: str) -> str:
    """What a page says between its fenced blocks."""
    return _FENCE.sub("", read_page(page))


def shell_blocks(page: str) -> list[Block]:
    """Those that a shell takes."""
    return [block for block in fenced(page) if block.language == "sh"]


def run_blocks(page: str, file: str) -> list[Block]:
    """Those that a test file runs: of the shell, and programs in Python."""
    return [block for block in fenced(page) if block.language in ("sh", "python") and block.run_by == file]


def commands(block: Block, *start: str) -> list[list[str]]:
    """The words of each simple command of a block that begins so, without redirections, assignments and comments."""
    return [words for words in _commands(block.script) if words[: len(start)] == list(start)]


def _commands(script: str) -> Iterator[list[str]]:
    for line in re.sub(r"\\\n\s*", "", script).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for token in lexer:
            if _REDIRECTS.fullmatch(token):
                next(lexer)
            elif _ENDS_COMMAND.fullmatch(token):
                yield words
                words = []
            elif words or not _ASSIGNMENT.fullmatch(token):
                words.append(token)
        yield words
