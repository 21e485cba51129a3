"""A verb's settings as text: the few that matter for `--help`, all of them for `--help-all`; and what is wrong with a
command line, in one line.

The text is read from the config tree itself: the name, type and default of each field, and the docstring below it.
What is easy to break: flags here are named as tyro names them; a test compares the two.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tyro

from kinoray.errors import ConfigError, in_full

__all__ = ["Setting", "settings_of", "source_first", "take_flag", "verb_help", "what_is_wrong"]

_INDENT = 26
_FLAG = re.compile(r"(?<![\w-])--?[a-z][\w.-]*")
_FEW = ("no", "one", "two", "three", "four")
_WIDEST = 110


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One setting of a verb."""

    path: str
    """`optim.lr`: its place in the config tree."""
    flag: str
    """`--optim.lr FLOAT`, or the placeholder of a positional argument."""
    text: str
    """Its docstring, as one paragraph."""
    default: str
    """`0.002`, or `needed`; empty where the docstring says what happens without it."""
    group: str
    """What the part of the tree that it is in is for; empty for the verb's own settings."""
    wanted: str
    """`a whole number`: what it must be, for messages."""
    num_values: int | None
    """How many values follow its flag at once. None: any number."""
    is_repeated: bool
    """Whether the flag may be given several times, and each counts."""

    @property
    def is_needed(self) -> bool:
        """Whether a command line without it is refused."""
        return self.default == "needed"

    def lines(self, width: int) -> list[str]:
        """The flag in the left column, the text in the right one."""
        note = f" ({self.default})" if self.is_needed else f" (default: {self.default})" if self.default else ""
        text = textwrap.wrap(self.text + note, width - _INDENT)
        left = f"  {self.flag}"
        if len(left) > _INDENT - 2:
            return [left, *(" " * _INDENT + line for line in text)]
        return [left.ljust(_INDENT) + text[0], *(" " * _INDENT + line for line in text[1:])]


def settings_of(cls: type[Any], prefix: str = "", group: str = "") -> Iterator[Setting]:
    """All settings of a config tree: a class's own, then those of the classes that it builds upon, in their order.

    Those of a part of the tree come where the part is.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    texts = _docstrings(cls)  # type: ignore[arg-type]  # a class can be hashed
    for field in _own_first(cls):
        hint, notes = _plain(hints[field.name])
        if tyro.conf.Suppress in notes:
            continue
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hint):
            yield from settings_of(typing.cast("type[Any]", hint), f"{path}.", texts[field.name].rstrip("."))
            continue
        yield Setting(
            path=path,
            flag=_flag(path, hint, notes),
            text=texts[field.name],
            default=_default(field, texts[field.name]),
            group=group,
            wanted=_wanted(hint, notes),
            num_values=_num_values(hint, notes),
            is_repeated=tyro.conf.UseAppendAction in notes,
        )


def verb_help(command: str, cls: type[Any], main: tuple[str, ...], extra: str, *, every: bool) -> str:
    """What `COMMAND --help` prints, or with `every` what --help-all does.

    Args:
        main: paths of the settings that matter most; those of its examples are explained as well.
        extra: other flags that settings come from.
    """
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    # What has no flag comes first, then the verb's own settings, then its parts.
    everything = sorted(settings_of(cls), key=lambda item: (item.flag.startswith("--"), bool(item.group)))
    paragraphs = (inspect.getdoc(cls) or "").split("\n\n")
    examples = " ".join(text.partition(" -- ")[0] for text in paragraphs if text.startswith("Example:"))
    used = {*_FLAG.findall(examples)}
    shown = [
        item for item in everything if every or item.path in main or item.is_needed or used.intersection(_flags([item]))
    ]
    needed = [item.flag for item in everything if item.is_needed]
    optional = [f"[{item.flag.strip('[]')}]" for item in everything if not item.is_needed and item.flag[0] != "-"]
    lines = [
        *textwrap.wrap(
            " ".join(["usage:", command, *optional, *needed, "[OPTIONS]"]),
            width,
            subsequent_indent=" " * 10,
            break_on_hyphens=False,
        ),
        "",
    ]
    for paragraph in paragraphs:
        is_list = any(line.startswith(" ") for line in paragraph.split("\n"))
        hang = "    " if paragraph.startswith("Example:") else ""
        wrapped = textwrap.wrap(paragraph, width, subsequent_indent=hang, break_on_hyphens=False)
        lines.extend(paragraph.split("\n") if is_list else wrapped)
        lines.append("")
    group = ""
    for item in shown:
        if item.group != group and every:
            group = item.group
            lines.extend(["", *textwrap.wrap(f"{group}:", width)])
        lines.extend(item.lines(width))
    lines.append("")
    if not every and len(shown) < len(everything):
        lines.append(f"{command} --help-all explains all {len(everything)} settings.")
    also = f"Settings also come from --config FILE.yaml{extra}; flags win over them. --print-config prints them all."
    lines.extend(textwrap.wrap(also, width))
    return "\n".join(lines)


def _own_first(cls: type[Any]) -> list["dataclasses.Field[Any]"]:
    names = list(dict.fromkeys(name for base in cls.__mro__ for name in inspect.get_annotations(base)))
    return sorted(dataclasses.fields(cls), key=lambda field: names.index(field.name))


@functools.cache
def _docstrings(cls: type[Any]) -> dict[str, str]:
    """The text below each field, also of fields that it inherits."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                found[field.target.id] = " ".join(str(after.value.value).split())  # type: ignore[attr-defined]
    return found


def _plain(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without what tyro is told of it, and that."""
    if get_origin(hint) is Annotated:
        return hint.__origin__, hint.__metadata__
    return hint, ()


def _flag(path: str, hint: Any, notes: tuple[Any, ...]) -> str:
    told = {name: getattr(note, name, None) for note in notes for name in ("metavar", "aliases") if hasattr(note, name)}
    value = told.get("metavar") or _value(hint)
    if tyro.conf.Positional in notes:
        return str(value)
    flag = "--" + path.replace("_", "-")
    names = [flag, *(told.get("aliases") or ())]
    if hint is bool:
        group, _, last = flag[2:].rpartition(".")
        return f"{', '.join(names)}, --{group + '.' if group else ''}no-{last}"
    if tyro.conf.UseAppendAction in notes:
        value = _value(get_args(hint)[0])
    return f"{', '.join(names)} {value}"


def _value(hint: Any) -> str:
    """`FLOAT`, `{off,exact}`, `TEXT [TEXT ...]`: what a flag of this type takes."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "{" + ",".join(str(arg) for arg in args if arg != "") + "}"  # an empty one is to leave the flag out
    if origin in (Union, types.UnionType):
        return "|".join("None" if arg is type(None) else _value(_plain(arg)[0]) for arg in args)
    if origin is tuple:
        one = _value(_plain(args[0])[0])
        return f"{one} [{one} ...]"
    return {int: "INT", float: "FLOAT", str: "TEXT"}.get(hint, "VALUE")


def _wanted(hint: Any, notes: tuple[Any, ...]) -> str:
    """`a whole number`, `one of off, exact`, `two numbers, FROM TO`: what a value of this type must be."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(str(arg) for arg in args if arg != '')}"
    if origin in (Union, types.UnionType):
        return " or ".join(_wanted(_plain(arg)[0], notes) for arg in args if arg is not type(None))
    if origin is tuple and args[-1] is not Ellipsis:
        metavar = next((note.metavar for note in notes if hasattr(note, "metavar")), "")
        each = {int: "whole numbers", float: "numbers"}.get(args[0], "values")
        return f"{_FEW[len(args)]} {each}" + (f", {metavar}" if metavar else "")
    if origin is tuple:
        one = _wanted(_plain(args[0])[0], ())
        return f"any of {one.removeprefix('one of ')}" if one.startswith("one of ") else f"{one.removeprefix('a ')}s"
    return {int: "a whole number", float: "a number", str: "a text"}.get(hint, "a value")


def _num_values(hint: Any, notes: tuple[Any, ...]) -> int | None:
    args = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return max(_num_values(_plain(arg)[0], ()) or 0 for arg in args)
    if get_origin(hint) is tuple and tyro.conf.UseAppendAction not in notes:
        return None if args[-1] is Ellipsis else len(args)
    if get_origin(hint) is dict:
        return None
    return 0 if hint is bool else 1


def _default(field: "dataclasses.Field[Any]", text: str) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "needed"
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value in ("", None, (), {}) or "Default:" in text:
        return ""
    if isinstance(value, bool):
        return "on" if value else ""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value)


# What is wrong with a command line

_FRAME = "\u2502\u256d\u256e\u2570\u256f"  # what tyro draws its boxes with, where the output can show it
_RULE = re.compile("[-\u2500]{3,}")
_NO_SETTINGS = ("--help", "--help-all", "--config", "--preset", "--like", "--print-config")


def what_is_wrong(name: str, cls: type[Any], arguments: Sequence[str], box: str) -> str:
    """The one line that a wrong command line is answered with. It begins with `Missing` where something is.

    Args:
        name: the verb.
        arguments: what tyro was given.
        box: what tyro printed: a title, the message, perhaps a suggestion, and a pointer to --help.
    """
    settings = list(settings_of(cls))
    unknown = _unknown_flag(settings, arguments)
    if unknown:
        near = difflib.get_close_matches(unknown, [*_flags(settings), *_NO_SETTINGS], n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        return f"there is no {unknown}; {meant}kinoray {name} --help-all explains all settings"
    plain = box.translate(str.maketrans("", "", _FRAME)).lstrip(" \u2500")
    parts = [" ".join(part.split()) for part in _RULE.split(plain)]
    message = [part for part in parts[1:] if part and not part.startswith(("For full helptext", "Argument helptext"))]
    text = " ".join(message or parts).removeprefix("Error parsing ")
    if text.startswith("Missing from "):
        needed = [item.flag.split(" ")[0] for item in settings if item.is_needed]
        missing = [flag for flag in needed if re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text)]
        return f"Missing: {', '.join(missing)}; kinoray {name} --help explains what is needed"
    if found := re.match(r"Unrecognized options:\s?(.*)", text):
        return _left_over(name, settings, arguments, found[1])
    place, colon, problem = text.partition(": ")
    if colon and re.match(r"[\w.]+ must ", problem):
        return in_full(place, problem)
    found = re.search(r" for argument '([^']+)'", text) or re.match(r"(--?[a-z][^ :]*): ", text)
    if found is None:
        return text
    names = found[1].split("/")  # with its aliases
    typed = next((flag for flag in map(_flag_of, arguments) if flag in names), names[-1])
    if text.startswith("Missing value "):
        return f"Missing: a value of {typed if typed.startswith('-') else typed.upper()}"
    if not typed.startswith("-"):
        (setting,) = (item for item in settings if item.flag.strip("[]") == typed.upper())
        chosen = re.match(r"invalid choice '(.*)' for", text)
        return f"{typed.upper()} must be {setting.wanted}, got {chosen[1] if chosen else 'another'!r}"
    (setting,) = (item for item in settings if typed in _flags([item]))
    given = ", ".join(map(repr, _values_of(arguments, typed))) or "nothing"
    return f"{typed} must be {setting.wanted}, got {given}"


def _left_over(name: str, settings: Sequence[Setting], arguments: Sequence[str], joined: str) -> str:
    """What is said of arguments that tyro had no use for, by what stands before the first of them."""
    surplus = joined.split(", ")
    first = next((place for place, argument in enumerate(arguments) if argument in surplus), len(arguments))
    begin = next((place for place in range(first - 1, -1, -1) if arguments[place].startswith("--")), None)
    value = repr(arguments[first]) if first < len(arguments) else repr(joined)
    if begin is not None and "=" not in arguments[begin]:
        flag = _flag_of(arguments[begin])
        setting = next((item for item in settings if flag in _flags([item])), None)
        if setting and setting.num_values == first - begin - 1:
            if not setting.num_values:
                return f"{flag} takes no value, got {value}"
            again = f"; for more than one say {flag} again before each" if setting.is_repeated else ""
            takes = f"{_FEW[setting.num_values]} value{'s' if setting.num_values > 1 else ''}"
            return f"{flag} takes {takes}, and {value} is one more; {_quotes(value)}{again}"
    taken = [item for item in settings if not item.flag.startswith("-")]
    if not taken:
        return f"kinoray {name} takes nothing but flags, got {value}"
    texts = [(item.flag.strip("[]"), re.split(r"[.:;] ", item.text)[0].rstrip(".")) for item in taken]
    each = ", and ".join(f"{placeholder} is {text[0].lower()}{text[1:]}" for placeholder, text in texts)
    return f"{value} is one too many: {each}; {_quotes(value)}"


def _quotes(value: str) -> str:
    if value.strip("'").endswith(".parquet"):  # the shell has put the names of files in place of a pattern
        return "put quotes around a pattern: 'PLACE/*.parquet'"
    return "put quotes around what holds spaces"


def _flag_of(argument: str) -> str:
    """`--batch_size=3` -> `--batch-size`; what is no flag as it is."""
    flag, _, _ = argument.partition("=")
    return flag.replace("_", "-") if argument.startswith("--") else argument


def _values_of(arguments: Sequence[str], flag: str) -> list[str]:
    """What follows a flag, where it stands last."""
    place = max(place for place, argument in enumerate(arguments) if _flag_of(argument) == flag)
    _, is_joined, value = arguments[place].partition("=")
    if is_joined:
        return [value]
    rest = arguments[place + 1 :]
    return list(itertools.takewhile(lambda argument: not argument.startswith("--"), rest))


def _flags(settings: Sequence[Setting]) -> list[str]:
    return [flag for item in settings for flag in _FLAG.findall(item.flag)]


def _unknown_flag(settings: Sequence[Setting], arguments: Sequence[str]) -> str:
    """The first argument that looks like a flag, and is none of these; tyro takes `_` for `-`."""
    known = {*_flags(settings)}
    for argument in arguments:
        if argument == "--":
            break
        if argument.startswith("--") and _flag_of(argument) not in known:
            return argument.partition("=")[0]
    return ""


# Command lines before tyro has them


def source_first(arguments: list[str]) -> list[str]:
    """`--annotations A B SOURCE` -> `SOURCE --annotations A B`: a flag that takes many values takes the source, too."""
    if "--annotations" not in arguments:
        return arguments
    begin = end = arguments.index("--annotations") + 1
    while end < len(arguments) and not arguments[end].startswith("--"):
        end += 1
    if end - begin < 2:
        return arguments
    return [arguments[end - 1], *arguments[: end - 1], *arguments[end:]]


def take_flag(arguments: list[str], flag: str, what: str) -> tuple[list[str], str]:
    """The arguments without `flag VALUE` or `flag=VALUE`, and the value; "" where it is not given."""
    rest: list[str] = []
    value = ""
    items = iter(arguments)
    for item in items:
        if item == flag:
            value = next(items, "")
            if not value:
                raise ConfigError(f"{flag} needs {what}")
        elif item.startswith(f"{flag}="):
            value = item.removeprefix(f"{flag}=")
        else:
            rest.append(item)
    return rest, value
