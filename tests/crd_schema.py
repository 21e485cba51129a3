"""Kubernetes' structural schemas, checked strictly: a field that the schema does not know is an error.

The API server would prune such a field, and `kubectl` at most warns: a misspelt limit would be no limit.
A keyword of the schema that is not known here is an error too: nothing passes because it was not looked at.
"""

import re
from typing import Any

__all__ = ["errors_in"]

_TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
_ELSEWHERE = {  # about merging, defaults and documentation: they forbid no value
    "default",
    "description",
    "format",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-list-type",
    "x-kubernetes-map-type",
}
_CHECKED = {
    "additionalProperties",
    "enum",
    "items",
    "maxLength",
    "maximum",
    "minItems",
    "minLength",
    "minimum",
    "nullable",
    "pattern",
    "properties",
    "required",
    "type",
    "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-validations",
}


def errors_in(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """What the schema does not allow in the value, each with the place of it."""
    where = path or "(top)"
    checked = _CHECKED | ({"anyOf"} if "x-kubernetes-int-or-string" in schema else set())  # it says the same again
    if unknown := set(schema) - checked - _ELSEWHERE:
        return [f"{where}: the schema says {', '.join(sorted(unknown))}, which is not checked here"]
    if "x-kubernetes-validations" in schema:  # rules in CEL
        return [f"{where}: has rules that only a cluster can check; leave it out"]
    if value is None:
        return [] if schema.get("nullable") else [f"{where}: is empty"]
    if wrong := _wrong_type(value, schema):
        return [f"{where}: {wrong}"]
    if isinstance(value, dict):
        return _errors_in_mapping(value, schema, path)
    if isinstance(value, list):
        short = len(value) < schema.get("minItems", 0)
        found = [f"{where}: has fewer than {schema['minItems']} items"] if short else []
        nested = (errors_in(item, schema["items"], f"{path}[{index}]") for index, item in enumerate(value))
        return found + [error for errors in nested for error in errors]
    return _errors_in_scalar(value, schema, where)


def _wrong_type(value: Any, schema: dict[str, Any]) -> str:
    if schema.get("x-kubernetes-int-or-string"):
        is_right, expected = isinstance(value, int | str) and not isinstance(value, bool), "integer or string"
    elif "type" in schema:
        expected = schema["type"]
        is_right = isinstance(value, _TYPES[expected]) and (expected == "boolean" or not isinstance(value, bool))
    else:
        is_right, expected = bool(schema.get("x-kubernetes-preserve-unknown-fields")), "a type"
    return "" if is_right else f"must be {expected}, found {value!r}"


def _errors_in_mapping(value: dict[str, Any], schema: dict[str, Any], path: str) -> list[str]:
    properties = schema.get("properties", {})
    errors = [f"{path}.{name}: is missing" for name in schema.get("required", ()) if name not in value]
    for name, item in value.items():
        child = properties.get(name, schema.get("additionalProperties"))
        if isinstance(child, dict):
            errors += errors_in(item, child, f"{path}.{name}")
        elif not schema.get("x-kubernetes-preserve-unknown-fields"):
            errors.append(f"{path}.{name}: is not a field of it")
    return errors


def _errors_in_scalar(value: Any, schema: dict[str, Any], where: str) -> list[str]:
    errors = []
    if "enum" in schema and value not in schema["enum"]:
        errors.append(f"{where}: must be one of {', '.join(map(str, schema['enum']))}, found {value!r}")
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        errors.append(f"{where}: {value!r} does not match {schema['pattern']}")
    if isinstance(value, str) and not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        errors.append(f"{where}: {value!r} is too short or too long")
    if not isinstance(value, str) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        errors.append(f"{where}: {value} is too small or too large")
    return errors
