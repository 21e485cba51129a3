"""YAML as plain values, read with bounds: what one line can make of itself with aliases, depth and doubled keys.

What is easy to break: `yaml.safe_load` runs no code, but 600 bytes of aliases that name aliases make gigabytes.
"""

import math
from typing import Any

import yaml

from kinoray.errors import ConfigError

__all__ = ["dump_yaml", "parse_yaml"]

MAX_CHARS = 2**20
"""Of the text, and of what it would be with every alias written out."""
_MAX_DEPTH = 64
_MAX_WHOLE = 2**63


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
            twice = next(value for tag, value in names if names.count((tag, value)) > 1)
            raise ValueError(f"the key {twice!r:.80} is there twice, line {node.start_mark.line + 1}")
        return node


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes out what is there twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


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
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:
        reason = " ".join(str(error).split())
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
