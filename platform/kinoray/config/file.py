"""Config trees from and to YAML: `--config file.yaml` and `--print-config` speak the same tree as the flags.

Unknown keys and values of a wrong type are refused with the field's full name; nothing is guessed. What is easy to
break: `yaml.safe_load` runs no code, but 600 bytes of aliases that name aliases make gigabytes, so it is bounded.
"""

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import tyro
import yaml

from kinoray.config.files import read_file, translated
from kinoray.errors import ConfigError, StorageError, in_full

__all__ = [
    "MAX_FILE_BYTES",
    "config_from_bytes",
    "config_from_mapping",
    "dump_yaml",
    "first_repeated",
    "is_of_a_run",
    "load_config",
    "parse_yaml",
    "to_yaml",
]

MAX_CHARS = 2**20
"""Of the text, and of what it would be with every alias written out."""
_MAX_DEPTH = 64
_MAX_WHOLE = 2**63
_MAX_DIGITS = 40
_NUMBER = re.compile(r"[-+]?(0|[1-9]\d*|\d*\.\d*|\.(inf|nan))([eE][-+]?\d+)?", re.ASCII | re.IGNORECASE)
_Key = TypeVar("_Key", bound=Hashable)


def first_repeated(items: Iterable[_Key]) -> _Key:
    """The first one that was there before; one is. In one pass, since a stranger chooses how many there are."""
    seen: set[_Key] = set()
    return next(item for item in items if item in seen or seen.add(item))  # type: ignore[func-returns-value]


class _Loader(yaml.SafeLoader):
    """SafeLoader that counts what it composes before it makes anything of it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._chars = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        before, is_alias = self._chars, self.check_event(yaml.AliasEvent)
        self._depth += 1
        self._chars += 1
        if self._depth > _MAX_DEPTH:
            raise ValueError(f"it is deeper than {_MAX_DEPTH}")
        node = super().compose_node(parent, index)
        assert node is not None  # only a stream without a document has none, and that never comes here
        self._depth -= 1
        if is_alias:
            if node not in self._sizes:
                raise ValueError("an alias names what it is part of")
            self._chars += self._sizes[node]
        elif isinstance(node, yaml.ScalarNode):
            self._chars += len(node.value)
        if self._chars > MAX_CHARS:
            raise ValueError(f"it is more than {MAX_CHARS} characters with its aliases written out")
        self._sizes[node] = self._chars - before
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            _, twice = first_repeated(names)
            raise ValueError(f"the key {twice!r:.80} is there twice, line {node.start_mark.line + 1}")
        return node

    def construct_number(self, node: yaml.ScalarNode) -> float:
        """Decimal numbers alone: YAML 1.1 knows base 60 as well, in which long texts take very long."""
        text = self.construct_scalar(node).replace("_", "")
        if len(text) > _MAX_DIGITS or not _NUMBER.fullmatch(text):
            raise ValueError(f"the number {text!r:.30} is not a short decimal one; put text in quotes")
        if node.tag.endswith(":int"):
            return int(text)
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes out what is there twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


for _side in (_Loader, _Dumper):  # 1e-3 is a number, as in JSON and YAML 1.2; PyYAML's YAML 1.1 wants 1.0e-3
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$", re.ASCII), list("-+.0123456789")
    )


def parse_yaml(text: str, what: str) -> Any:
    """The value of a YAML text: texts, numbers, true and false, null, lists, and mappings with texts as keys.

    Raises:
        ConfigError: it is not YAML, or too much; the message begins with `what`.
    """
    try:
        if len(text) > MAX_CHARS:
            raise ValueError(f"it has {len(text)} characters, at most {MAX_CHARS} are read")
        value = yaml.load(text, _Loader)
        _check(value)
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split()).replace(' in "<unicode string>", line', ", line")
        if isinstance(error, LookupError | AttributeError):  # what PyYAML makes of `!!bool maybe`
            reason = "a value is not what its tag (!!bool and the like) says; leave the tag out"
        raise ConfigError(f"{what} is not YAML that can be read here: {reason:.300}") from error
    return value


def _check(value: Any) -> None:
    """Refuse what JSON cannot hold: settings and options are stored as JSON."""
    if isinstance(value, list | dict):
        for key in value if isinstance(value, dict) else ():
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r:.80} is no text; put it in quotes")
        for item in value.values() if isinstance(value, dict) else value:
            _check(item)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is no finite number")
    elif isinstance(value, int):
        if not -_MAX_WHOLE <= value < _MAX_WHOLE:
            raise ValueError("a whole number does not fit 64 bits")
    elif isinstance(value, str):
        value.encode("utf-8")
    elif value is not None:
        raise ValueError(f"a {type(value).__name__} is no setting; put it in quotes to make it text")


def dump_yaml(value: Any) -> str:
    """Plain values as YAML, in their order."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


T = TypeVar("T")
MAX_FILE_BYTES = 4 * MAX_CHARS
"""Of a file of settings."""


def load_config(cls: type[T], path: str) -> T:
    """Read a YAML file into a config tree; fields it leaves out keep their defaults, required ones stay open.

    Raises:
        ConfigError: the file is missing or no YAML mapping, a key is unknown, or a value is wrong.
    """
    try:
        with translated(path):
            data = read_file(path, MAX_FILE_BYTES)
    except StorageError as error:
        raise ConfigError(f"--config {error}") from error
    return config_from_bytes(cls, data, f"--config {path}")


def config_from_bytes(cls: type[T], data: bytes, what: str) -> T:
    """The config tree that a YAML file holds, as load_config reads it; messages begin with `what`.

    Raises:
        ConfigError: it is no YAML mapping, a key is unknown, or a value is wrong.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8 text: {error}") from error
    content = parse_yaml(text, what)
    if not isinstance(content, dict):
        raise ConfigError(f"{what} must hold a mapping of settings, found {type(content).__name__}")
    try:
        return config_from_mapping(cls, content)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from error


def config_from_mapping(cls: type[T], content: dict[str, Any], prefix: str = "", *, complete: bool = False) -> T:
    """Build the dataclass `cls` from nested mappings. Raises ConfigError naming the field.

    A required field that is left out stays open (tyro.MISSING), for flags to give; it is refused where `complete`.
    """
    hints = typing.get_type_hints(cls, include_extras=False)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in content:
        if key not in fields:
            known = ", ".join(sorted(fields))
            raise ConfigError(f"{prefix}{key!s:.80} is not a setting; there are {known}")
    values: dict[str, Any] = {
        name: _convert(hints[name], content[name], f"{prefix}{name}", complete) for name in fields if name in content
    }
    for name, field in fields.items():
        missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if missing and name not in values:
            if complete:
                raise ConfigError(f"{prefix}{name} is missing")
            values[name] = tyro.MISSING
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(in_full(prefix.rstrip("."), str(error))) from error


def _convert(hint: Any, value: Any, name: str, complete: bool) -> Any:
    """`value` as the type that the field declares, or ConfigError."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return config_from_mapping(typing.cast(type, hint), value, prefix=f"{name}.", complete=complete)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        hint = next(arg for arg in args if arg is not type(None))
        return _convert(hint, value, name, complete)
    if hint is Any:
        return value
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list) and (args[-1] is Ellipsis or len(args) == len(value)):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        items = enumerate(zip(kinds, value, strict=True))
        return tuple(_convert(kind, item, f"{name}[{index}]", complete) for index, (kind, item) in items)
    if isinstance(hint, type) and issubclass(hint, tuple) and isinstance(value, list):  # a NamedTuple
        places = typing.get_type_hints(hint)
        if len(places) == len(value):
            pairs = zip(places.items(), value, strict=True)
            return hint(*(_convert(kind, item, f"{name}.{key}", complete) for (key, kind), item in pairs))
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {key: _convert(args[1], item, f"{name}.{key!s:.80}", complete) for key, item in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1024:
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    expected = " or ".join(map(repr, args)) if origin is Literal else _words(hint)
    raise ConfigError(f"{name} must be {expected}, got {value!r:.200}")


def _words(hint: Any) -> str:
    if dataclasses.is_dataclass(hint) or get_origin(hint) in (dict, Mapping):
        return "a mapping"
    if get_origin(hint) is tuple:
        return "a list"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint, str(hint))


def to_yaml(config: Any) -> str:
    """The whole tree as YAML that `--config` reads back to an equal config; required fields not given are left out."""
    return dump_yaml(_plain(config))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: _plain(item) for name, item in items if item is not tyro.MISSING}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def is_of_a_run(path: str) -> bool:
    """Whether a config may be a stranger's run: that may lack what would show it, so the name of the file is enough."""
    return any(
        place.name in _OUR_CONFIGS or any(os.path.lexists(place.parent / file) for file in _RUN_FILES)
        for place in (Path(path), Path(path).resolve())
    )


_OUR_CONFIGS = ("config.yaml", "best.yaml")  # what kinoray writes into runs and sweeps
_RUN_FILES = ("run.json", "sweep.json")  # what it writes beside them
