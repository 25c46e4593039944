"""Dataclasses from what YAML holds: every name and type is checked, and the error names field, value and remedy.

Knows nothing of what the fields mean.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml


WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


class _Loader(yaml.SafeLoader):
    """
    YAML 1.2's numbers and truth values, where PyYAML reads YAML 1.1: 6e-4 is a number, `eval_strategy: no` is text.
    A name that comes twice is an error, where PyYAML takes the last.
    """

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_RESOLVERS = _Loader.yaml_implicit_resolvers
for _letter in "yYnNoO":  # of yes, no, on and off
    _RESOLVERS[_letter] = [pair for pair in _RESOLVERS[_letter] if pair[0] != "tag:yaml.org,2002:bool"]


def read_yaml(text: str) -> Any:
    """Raises: yaml.YAMLError."""
    return yaml.load(text, _Loader)  # a safe one


def shipped_names(folder: Traversable) -> list[str]:
    """The YAML files of a folder of the package, without their ending."""
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def find_yaml(source: str | Path, shipped: Traversable, kind: str, beside: Path = Path()) -> Path:
    """The file `source`, beside another one, or the one of that name in a folder of the package.

    Raises:
        FileNotFoundError: where there is neither (with the nearest known name).
    """
    path, names = beside / source, shipped_names(shipped)
    if path.is_file():
        return path
    if str(source) not in names:
        near = difflib.get_close_matches(str(source), names, n=3) or names
        raise FileNotFoundError(
            f"{source} is no file, nor a {kind} of the package; those are, for instance, {', '.join(near)}."
        )
    return Path(str(shipped / f"{source}.yaml"))


def read_fields(path: Path) -> dict[str, Any]:
    """What a YAML file holds; a ValueError if that is not fields and values."""
    try:
        fields = read_yaml(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold fields and values, but holds {fields!r}.")
    return fields


def build(cls: type, values: dict[str, Any], where: str = "", kind: str = "no field of a recipe") -> Any:
    """
    A dataclass, with those inside it, from plain values.

    Args:
        where: what the names of its fields begin with in errors, such as "model.".
        kind: what an unknown field is.

    Raises:
        ValueError: for an unknown field (with the nearest known one) or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    check_names(values, [field.name for field in dataclasses.fields(cls)], where, kind)
    built = {}
    for name, value in values.items():
        if not dataclasses.is_dataclass(hints[name]):
            check_type(where + name, value, hints[name])
            built[name] = value
        elif isinstance(value, dict):
            built[name] = build(hints[name], value, f"{where}{name}.", kind)
        else:
            raise ValueError(f"`{where}{name}` is {value!r}; it must hold fields and values.")
    return cls(**built)


def check_names(
    names: Iterable[str], known: Iterable[str], where: str = "", kind: str = "no field of a recipe"
) -> None:
    """Raise a ValueError for the first of `names` that is not `known`."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            choice = f"did you mean `{where}{near[0]}`?" if near else f"known are {', '.join(known[:12])}, ..."
            raise ValueError(f"`{where}{name}` is {kind}; {choice}")


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise a ValueError unless `value` is of the type."""
    if not _is_of(value, hint):
        raise ValueError(f"`{name}` is {value!r}; it must be {_words(hint)}.")


def _is_of(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, choice) for choice in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_is_of(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_of(item, arguments[1]) for item in value.values())
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        known = [choice for choice in arguments if typing.get_origin(choice) or choice in WORDS]
        return " or ".join(dict.fromkeys(_words(choice) for choice in known))
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin is list:
        return f"a list, each {_words(arguments[0])}"
    if hint is dict or origin is dict:
        return "fields and values"
    return WORDS.get(hint, getattr(hint, "__name__", str(hint)))
