"""The parameters of a section, a line each of its parameters cell, ``name: kind = default  # help``; their types."""

import ast
import math
from functools import lru_cache

import yaml

SCALARS = {"bool": bool, "int": int, "float": float, "str": str}
KINDS = (*SCALARS, "list[int]", "list[float]", "list[str]")


class ParameterError(ValueError):
    """A section, a profile or a parameter that does not exist, or a value of the wrong type."""


def checked(origin: str, name: str, kind: str, value):
    """``value`` as ``kind``; text is read as that kind (a list as YAML), anything else must be of it already.

    An int is accepted for a float, and nothing else for anything else.
    Raises: ParameterError, which begins with ``origin``.
    """
    try:
        if not kind.startswith("list["):
            return _scalar(kind, value)
        items = yaml_text(value) if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ValueError("not a list")
        return [_scalar(kind[5:-1], item) for item in items]
    except (ValueError, KeyError, yaml.YAMLError):
        raise ParameterError(f"{origin}: {name} must be {kind}, got {value!r}") from None


def _scalar(kind: str, value):
    # Python's own reading of numbers, not YAML 1.1's, for which 1e-3 is text, 010 is eight and 1:30 is ninety.
    if isinstance(value, str):
        value = {"true": True, "false": False}[value.lower()] if kind == "bool" else SCALARS[kind](value)
    if kind == "float" and type(value) is int:
        value = float(value)
    if type(value) is not SCALARS[kind] or (kind == "float" and not math.isfinite(value)):
        raise ValueError(f"not a {kind}")
    return value


@lru_cache(maxsize=64)
def yaml_text(text: str):
    """YAML with its leaves left as text; not to be changed by who gets it."""
    return yaml.load(text, yaml.BaseLoader)


def check(section: str, namespace: dict) -> None:
    """Refuse parameters that are not of the kinds that the notebook's own cells declare; converts nothing.

    ``labelaug run`` has checked before anything starts; papermill alone checks nothing, and hands on a word for a list.

    Args: namespace: ``globals()`` of the notebook, where IPython keeps the cells that have run, as ``In``.
    Raises: ParameterError.
    """
    kinds = {name: kind for source in namespace["In"] for name, kind in _declared(source) if name in namespace}
    for name, kind in kinds.items():
        value = namespace[name]
        try:
            right = checked(section, name, kind, value) == value  # text that could be read as the kind is not of it
        except ParameterError:
            right = False
        if not right:
            cure = f"; papermill takes a list as -y '{name}: [...]'" if kind.startswith("list[") else ""
            raise ParameterError(f"{section}: {name} must be {kind}, got {value!r}{cure}")


def _declared(source: str) -> list[tuple[str, str]]:
    """The lines ``name: kind = value`` of a cell, for the kinds that a parameter can have."""
    try:
        lines = ast.parse(source).body
    except SyntaxError:  # a cell that did not run either
        return []
    annotated = [line for line in lines if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)]
    found = [(line.target.id, ast.unparse(line.annotation)) for line in annotated]
    return [(name, kind) for name, kind in found if kind in KINDS]
