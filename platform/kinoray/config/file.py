"""Config trees from and to YAML: `--config file.yaml` and `--print-config` speak the same tree as the flags.

Unknown keys and values of a wrong type are refused with the field's full name; nothing is guessed.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import tyro

from kinoray.config.files import read_file, translated
from kinoray.config.yaml_text import MAX_CHARS, dump_yaml, parse_yaml
from kinoray.errors import ConfigError, StorageError

__all__ = ["config_from_mapping", "load_config", "to_yaml"]

T = TypeVar("T")
_MAX_BYTES = 4 * MAX_CHARS


def load_config(cls: type[T], path: str) -> T:
    """Read a YAML file into a config tree; fields it leaves out keep their defaults, required ones stay open.

    Raises:
        ConfigError: the file is missing or no YAML mapping, a key is unknown, or a value is wrong.
    """
    try:
        with translated(path):
            text = read_file(path, _MAX_BYTES).decode()
    except StorageError as error:
        raise ConfigError(f"--config {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not UTF-8 text: {error}") from error
    content = parse_yaml(text, f"--config {path}")
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold a mapping of settings, found {type(content).__name__}")
    try:
        return config_from_mapping(cls, content)
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from error


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
    return cls(**values)


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
