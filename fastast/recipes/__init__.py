"""Options of published training recipes, as YAML files whose keys are fields of `TrainConfig`.

A recipe names only what it decides; everything else keeps its default. So recipes combine: one for
the data, one for the distillation.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from fastast.recipe import TrainConfig

if TYPE_CHECKING:
    import yaml

__all__ = ["names", "read"]

FOLDER = Path(__file__).parent
SUFFIXES = (".yaml", ".yml")
KINDS = {
    str: "text, in quotes if it looks like a number",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def names() -> tuple[str, ...]:
    """Names of the recipes that are part of the package, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def read(*recipes: str | os.PathLike[str]) -> dict[str, Any]:
    """Options of one recipe, or of several of which later ones win.

    Args:
        recipes: Names of `names()`, and paths of files that end in `.yaml` or `.yml`. Paths inside
            a file are relative to the working directory, as on the command line.

    Returns:
        Fields of `TrainConfig` and their values; `TrainConfig(**read("esc50"))` is the recipe.

    Raises:
        ValueError: No such recipe, a file that is not YAML, a key that is no field of
            `TrainConfig`, or a value of another type than the field's.
    """
    values: dict[str, Any] = {}
    for recipe in recipes:
        values.update(_read(_path(recipe)))
    return values


def _path(recipe: str | os.PathLike[str]) -> Path:
    if Path(recipe).suffix.lower() in SUFFIXES:
        return Path(recipe)
    if recipe not in names():
        raise ValueError(
            f"recipe must be one of {', '.join(names())}, or a file that ends in "
            f"{' or '.join(SUFFIXES)}, not {os.fspath(recipe)!r}"
        )
    return FOLDER / f"{recipe}.yaml"


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _loader())
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"recipe {path} cannot be read: {reason}") from None
    if content is None:  # nothing but comments
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path} must be lines of 'option: value', not {content!r}")
    hints = get_type_hints(TrainConfig)
    values = {}
    for key, value in content.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"recipe {path}: {key!r} is not an option of a training run{hint}; it may be one "
                f"of {', '.join(hints)}"
            )
        try:
            values[key] = _typed(value, hints[key])
        except TypeError:
            raise ValueError(
                f"recipe {path}: {key} must be {_words(hints[key])}, not {value!r}"
            ) from None
    return values


def _typed(value: Any, kind: Any) -> Any:
    """A value from YAML as the type of a field; TypeError if it is another."""
    arguments = get_args(kind)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise TypeError
        return tuple(_typed(item, arguments[0]) for item in value)
    if NoneType in arguments:
        return None if value is None else _typed(value, arguments[0])
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # not isinstance: a bool is no number here
        raise TypeError
    return value


def _words(kind: Any) -> str:
    arguments = get_args(kind)
    if get_origin(kind) is tuple:
        return f"a list, [...], each of it {KINDS[arguments[0]]}"
    return f"{KINDS[arguments[0]]} or null" if arguments else KINDS[kind]


def _loader() -> type[yaml.SafeLoader]:
    """A safe loader that reads as YAML 1.2 does: `1e-5` is a number, and `no` is a text.

    PyYAML follows YAML 1.1, where they are a text and false. A key given twice is an error.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {}
    for kind, pattern, first in (
        ("null", r"null$|~$|$", ["n", "~", ""]),
        ("bool", r"(true|false)$", ["t", "f"]),
        ("int", r"[-+]?(0|[1-9]\d*)$", list("-+0123456789")),
        ("float", r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$", list("-+.0123456789")),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(pattern), first)
    return Loader
