"""What can be wrong with a config, and the report: all problems at once, one line each.

In: problems found by the YAML loader, by pydantic and by the cross-field rules.
Out: `ConfigError`, whose text is `place: path: found VALUE: rule` line by line. No torch.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


class Tree(Protocol):
    """The part of the loader's tree used here: location and value at, or just above, a path."""

    @property
    def place(self) -> str: ...

    def plain(self) -> object: ...

    def nearest(self, path: Sequence[str | int]) -> "Tree": ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One mistake: its location, its key, the value found there, and the rule it breaks.

    `path` and `found` may be empty, for a file that cannot be read at all.
    """

    place: str
    path: tuple[str, ...]
    found: str
    rule: str

    def position(self, files: Sequence[str]) -> tuple[int, int]:
        """Sorts problems as a reader meets them: file by file, line by line, overrides last."""
        file, _, line = self.place.rpartition(":")
        return (files.index(file), int(line)) if file in files else (len(files), 0)

    def __str__(self) -> str:
        found = f"found {self.found}" if self.found else ""
        parts = (self.place, ".".join(self.path), found, self.rule)
        return ": ".join(part for part in parts if part)


class ConfigError(ValueError):
    """Every problem of a config; its text is the report for the user."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} in the config:"
        super().__init__("\n".join([head, *(f"  {problem}" for problem in self.problems)]))


def did_you_mean(word: str, known: Sequence[str], *, cutoff: float = 0.6) -> str:
    """' (did you mean 'x'?)' for the closest known word, or nothing when none is close.

    >>> did_you_mean("learning", ["loss", "pack"]), did_you_mean("pach", ["loss", "pack"])
    ('', " (did you mean 'pack'?)")
    """
    close = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f" (did you mean '{close[0]}'?)" if close else ""


def show(value: object) -> str:
    """A value as a user would write it in YAML, cut to a readable length."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = f"'{value}'"
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{k}: {_bare(v)}" for k, v in value.items()) + "}"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(_bare(v) for v in value) + "]"
    else:
        text = str(getattr(value, "text", value))
    return text if len(text) <= 80 else text[:77] + "..."


def _bare(value: object) -> str:
    return value if isinstance(value, str) else show(value)


def problems_of(error: ValidationError, model: type[BaseModel], tree: Tree) -> list[Problem]:
    """The errors of pydantic about `tree.plain()`, in our words and with their locations."""
    problems = []
    for detail in error.errors(include_url=False):
        if detail["type"] == "default_factory_not_called":
            continue  # follows from another problem of the same section
        path = tuple(str(part) for part in detail["loc"] if part != "[key]")
        node = tree.nearest(path)
        found = "nothing" if detail["type"] == "missing" else show(node.plain())
        if detail["loc"][-1:] == ("[key]",):
            found = show(path[-1])
        problems.append(
            Problem(
                place=node.place,
                path=path,
                found=found,
                rule=_rule(detail, path, model),
            )
        )
    return problems


def _rule(detail: ErrorDetails, path: tuple[str, ...], model: type[BaseModel]) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = _keys_beside(model, path)
        elsewhere = [key for key in _all_keys(model) if key.endswith(f".{path[-1]}")]
        near = did_you_mean(path[-1], known) or did_you_mean(path[-1], elsewhere, cutoff=0)
        return f"unknown key{near or '; known here: ' + ', '.join(known)}"
    about = _description(model, path)
    meaning = f" ({about})" if about else ""
    if kind == "missing" and path[-1].isdecimal():
        return f"the list needs an item more{meaning}"
    if kind == "missing":
        return f"this key is required{meaning}"
    if kind == "value_error":
        return str(context["error"])
    if kind in ("enum", "literal_error"):
        words = re.findall(r"'([^']*)'", str(context["expected"]))
        near = did_you_mean(str(detail["input"]), words)
        return f"must be one of {', '.join(words)}{near}{meaning}"
    if kind == "too_short" and context["min_length"] == 1:
        return f"must not be empty{meaning}"
    template = _RULES.get(kind)
    rule = template.format(**context) if template else detail["msg"][0].lower() + detail["msg"][1:]
    return f"{rule}{meaning}"


_RULES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a text; put it in quotes if it looks like a number",
    "path_type": "must be a path",
    "string_pattern_mismatch": "must match {pattern}",
    "string_too_short": "must not be empty",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "tuple_type": "must be a list such as [a, b]",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
}


def _keys_beside(model: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """The keys that are known where `path` ends."""
    section = _walk(model, path[:-1])
    return list(section.model_fields) if isinstance(section, type) else []


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted paths of all keys; NAME stands for a name of the user's own."""
    keys = []
    for name in model.model_fields:
        keys.append(f"{prefix}{name}")
        for inside, below in (("", (name,)), ("NAME.", (name, "NAME"))):
            section = _walk(model, below)
            if section is not None:
                keys += _all_keys(section, f"{prefix}{name}.{inside}")
    return keys


def _description(model: type[BaseModel], path: tuple[str, ...]) -> str:
    """The description of the deepest field on `path`, without its full stop."""
    for end in range(len(path), 0, -1):
        section = _walk(model, path[: end - 1])
        if isinstance(section, type) and path[end - 1] in section.model_fields:
            return (section.model_fields[path[end - 1]].description or "").rstrip(".")
    return ""


def _walk(model: type[BaseModel], path: tuple[str, ...]) -> type[BaseModel] | None:
    """The section that `path` leads to; a mapping of sections swallows one key."""
    here: Any = model
    for part in path:
        if isinstance(here, type) and issubclass(here, BaseModel):
            field = here.model_fields.get(part)
            here = field.annotation if field else None
        else:
            arguments = get_args(here)
            here = arguments[1] if get_origin(here) is dict else None
    return here if isinstance(here, type) and issubclass(here, BaseModel) else None
