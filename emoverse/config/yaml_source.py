"""YAML files and dotted overrides -> one merged tree in which every value has its location.

In: paths and texts such as `train.processes=2`. Out: `Node`s with file and line, plus all problems
of the sources. The first half of `schema.load_config`; no torch, no schema here.
Scalars follow the YAML 1.2 core schema: `1e-5` is a float, `010` is ten, `yes` is a text.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.nodes import Node as YamlNode

from emoverse.config.errors import ConfigError, Problem, did_you_mean

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.nan"
)
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_CORE_TAG = "tag:yaml.org,2002:"


class ExactFloat(float):
    """A float that remembers the text it was written as, so that a rate 0.4 stays exactly 2/5."""

    text: str

    def __new__(cls, text: str) -> "ExactFloat":
        value = super().__new__(cls, text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        value.text = text
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A value of the config and its location, `file:line` or `override 'x=y'`."""

    place: str
    value: "bool | int | float | str | list[Node] | dict[str, Node] | None"

    def plain(self) -> Plain:
        """The value without locations, as the schema takes it."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def nearest(self, path: Sequence[str | int]) -> "Node":
        """The node at `path`, or its closest existing ancestor."""
        node = self
        for part in path:
            below = _child(node, str(part))
            if below is None:
                break
            node = below
        return node


def split_words(words: Iterable[str]) -> tuple[list[Path], list[str]]:
    """Config files and overrides of a command line: an override has an equals sign.

    No key holds a slash, so a slash before the sign makes a path, as of a run in `runs/lr=1e-4`.
    """
    paths: list[Path] = []
    overrides: list[str] = []
    for word in words:
        key, sign, _ = word.partition("=")
        if sign and "/" not in key:
            overrides.append(word)
        else:
            paths.append(Path(word))
    return paths, overrides


def load_tree(
    paths: Sequence[Path], overrides: Sequence[str], *, closed: str = ""
) -> tuple[Node, list[Problem]]:
    """Merge files, then overrides, left to right: mappings key by key, everything else replaced.

    closed: a top-level key whose entries have names of the user's own (`stages`); overrides reach
        into the entries that the files hold, so that a misspelled name is not taken for a new one.
    Returns the tree and what is wrong with it, so that the schema's own findings can be added to
    the same report. Raises ConfigError only if a file cannot be read as YAML at all.
    """
    problems: list[Problem] = []
    root = Node(place=str(paths[0]) if paths else "the config", value={})
    unreadable: list[Problem] = []
    for path in paths:
        try:
            root = _merge(root, _read(path, problems))
        except ConfigError as error:
            unreadable += error.problems
    if unreadable:
        raise ConfigError(unreadable)
    for text in overrides:
        override = _parse_override(text, problems)
        if override is not None and _is_open(root, *override, closed, problems):
            root = _set(root, *override, problems)
    return root, problems


def _read(path: Path, problems: list[Problem]) -> Node:
    if path.is_dir():
        raise ConfigError([_broken(str(path), "a config is a YAML file, not a folder")])
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = did_you_mean(path.name, sorted(p.name for p in path.parent.glob("*.yaml")))
        rule = f"no such file; relative paths start at the working directory{near}"
        raise ConfigError([_broken(str(path), rule)]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([_broken(str(path), f"cannot be read: {error}")]) from None
    return _compose(text, str(path), problems)


def _compose(text: str, file: str, problems: list[Problem]) -> Node:
    """Parse one YAML document; the top level must be a mapping."""
    try:
        top = YAML(typ="rt").compose(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        what = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        raise ConfigError([_broken(f"{file}:{line}", f"this is not valid YAML: {what}")]) from None
    except YAMLError as error:
        what = str(error).splitlines()[0]
        raise ConfigError([_broken(file, f"this is not valid YAML: {what}")]) from None
    if top is None:
        return Node(place=f"{file}:1", value={})
    if not isinstance(top, MappingNode):
        rule = f"the top level of a config is a mapping such as `run:`, this is {_kind(top)}"
        raise ConfigError([_broken(f"{file}:1", rule)])
    return _convert(top, file, f"{file}:1", (), problems)


def _convert(
    node: YamlNode, file: str, place: str, path: tuple[str, ...], problems: list[Problem]
) -> Node:
    """A YAML node as a Node; what is not supported becomes a problem and the value null."""
    if node.anchor:
        rule = "anchors and aliases are not supported; write the value out in each place"
        problems.append(Problem(place=place, path=path, found=f"&{node.anchor}", rule=rule))
        return Node(place=place, value=None)
    if not str(node.tag).startswith(_CORE_TAG):
        rule = "YAML tags are not supported; remove the tag"
        problems.append(Problem(place=place, path=path, found=str(node.tag), rule=rule))
        return Node(place=place, value=None)
    if isinstance(node, ScalarNode):
        value = node.value if node.style else resolve_scalar(node.value)
        return Node(place=place, value=value)
    if isinstance(node, SequenceNode):
        items = [
            _convert(item, file, _place(file, item), (*path, str(i)), problems)
            for i, item in enumerate(node.value)
        ]
        return Node(place=place, value=items)
    return Node(place=place, value=_convert_mapping(node, file, path, problems))


def _convert_mapping(
    node: YamlNode, file: str, path: tuple[str, ...], problems: list[Problem]
) -> dict[str, Node]:
    entries: dict[str, Node] = {}
    for key_node, value_node in node.value:
        place = _place(file, key_node)
        if not isinstance(key_node, ScalarNode):
            rule = "a key is a word, not a list or a mapping"
            problems.append(Problem(place=place, path=path, found=_kind(key_node), rule=rule))
            continue
        key = str(key_node.value)
        if key in entries:
            rule = f"a key may stand only once, and it stands already at {entries[key].place}"
            problems.append(
                Problem(place=place, path=(*path, key), found="a second one", rule=rule)
            )
            continue
        entries[key] = _convert(value_node, file, place, (*path, key), problems)
    return entries


def resolve_scalar(text: str) -> bool | int | float | str | None:
    """An unquoted scalar by the YAML 1.2 core schema.

    >>> resolve_scalar("1e-5"), resolve_scalar("010"), resolve_scalar("2/5"), resolve_scalar("no")
    (1e-05, 10, '2/5', 'no')
    """
    lowered = text.lower() if text in (text.lower(), text.capitalize(), text.upper()) else text
    if lowered in _WORDS:
        return _WORDS[lowered]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return ExactFloat(text)
    return text


def _parse_override(text: str, problems: list[Problem]) -> tuple[tuple[str, ...], Node] | None:
    """`stages.stage1.rates.fer=0.2` -> (path, node); None, and a problem, if it is malformed."""
    place = f"override '{text}'"
    name, equals, value = text.partition("=")
    path = tuple(name.strip().split("."))
    if not equals or not all(path):
        rule = "an override is KEY.KEY=VALUE, for example train.processes=2"
        problems.append(_broken(place, rule))
        return None
    try:
        # As the value of a key, so that everything YAML allows there works on one line.
        holder = _compose(f"value: {value}", place, problems)
    except ConfigError as error:
        problems.extend(
            Problem(place=place, path=path, found=p.found, rule=p.rule) for p in error.problems
        )
        return None
    node = holder.nearest(["value"])
    return path, _relocate(node, place)


def _is_open(
    root: Node, path: tuple[str, ...], node: Node, closed: str, problems: list[Problem]
) -> bool:
    entries = root.nearest([closed]).value
    if len(path) < 3 or path[0] != closed or not isinstance(entries, dict) or path[1] in entries:
        return True
    rule = f"the files have no such entry{did_you_mean(path[1], list(entries))}"
    known = f"; known in {closed}: {', '.join(entries)}"
    problems.append(
        Problem(place=node.place, path=path, found=f"'{path[1]}'", rule=f"{rule}{known}")
    )
    return False


def _set(root: Node, path: tuple[str, ...], node: Node, problems: list[Problem]) -> Node:
    """`root` with `node` merged in at `path`; missing keys above it are created."""
    if not path:
        return _merge(root, node)
    head, rest = path[0], path[1:]
    if isinstance(root.value, list):
        if not head.isdecimal() or int(head) >= len(root.value):
            rule = f"no item {head}: the list there has {len(root.value)}, numbered from 0"
            problems.append(_broken(node.place, rule))
            return root
        items = list(root.value)
        items[int(head)] = _set(items[int(head)], rest, node, problems)
        return Node(place=root.place, value=items)
    entries = dict(root.value) if isinstance(root.value, dict) else {}
    below = entries.get(head, Node(place=node.place, value=None))
    entries[head] = _set(below, rest, node, problems)
    place = root.place if isinstance(root.value, dict) else node.place
    return Node(place=place, value=entries)


def _merge(old: Node, new: Node) -> Node:
    if not (isinstance(old.value, dict) and isinstance(new.value, dict)):
        return new
    merged = dict(old.value)
    for key, node in new.value.items():
        merged[key] = _merge(merged[key], node) if key in merged else node
    return Node(place=old.place, value=merged)


def _child(node: Node, part: str) -> Node | None:
    if isinstance(node.value, dict):
        return node.value.get(part)
    if isinstance(node.value, list) and part.isdecimal() and int(part) < len(node.value):
        return node.value[int(part)]
    return None


def _relocate(node: Node, place: str) -> Node:
    if isinstance(node.value, dict):
        inner = {key: _relocate(below, place) for key, below in node.value.items()}
        return Node(place=place, value=inner)
    if isinstance(node.value, list):
        return Node(place=place, value=[_relocate(item, place) for item in node.value])
    return Node(place=place, value=node.value)


def _place(file: str, node: YamlNode) -> str:
    return f"{file}:{node.start_mark.line + 1}"


def _kind(node: YamlNode) -> str:
    kinds: Iterator[str] = (
        word
        for cls, word in ((MappingNode, "a mapping"), (SequenceNode, "a list"))
        if isinstance(node, cls)
    )
    return next(kinds, repr(node.value))


def _broken(place: str, rule: str) -> Problem:
    return Problem(place=place, path=(), found="", rule=rule)
