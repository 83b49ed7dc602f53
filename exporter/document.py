"""A YAML file whose nodes still know their lines, so that a mistake can be told by key and line.

In: a path. Out: nodes, and what stands in them once a parser has taken it. Everything wrong is a SettingsError that
names file, line, key and, where one is near, the right key. Not its job: what the keys mean.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

import yaml

from exporter.errors import SettingsError

# No configuration is larger, and reading it whole would cost the node its memory.
MAX_BYTES = 1 << 20

_DEPTH = 32

# libyaml where PyYAML was built with it: a list of 10,000 networks in 0.2 s instead of 2.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read(path: str, what: str, variable: str = "") -> yaml.Node | None:
    """The document's root, None where it is empty. `what` names the file in a complaint: "the configuration".
    `variable`: the one that named the file, told where it cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SettingsError(f"{f'{variable}={path}' if variable else path}: cannot read {what}: {reason}") from None
    if len(data) > MAX_BYTES:
        raise SettingsError(f"{path}: larger than {MAX_BYTES >> 20} MiB; this is not {what}")
    try:
        # compose() is the first half of safe_load(): the same resolver, but the nodes still know their lines,
        # and keys that stand twice are still there to be refused.
        if _depth(data) > _DEPTH:
            raise SettingsError(f"{path}: not YAML that ebfw reads: nested more than {_DEPTH} deep")
        root = yaml.compose(data, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else path
        raise SettingsError(f"{where}: not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    return None if root is None or _is_null(root) else root


def _depth(data: bytes) -> int:
    """How deep the document is nested. libyaml's composer recurses in C: a megabyte of brackets would end the process,
    where its parser only counts them."""
    deepest = depth = 0
    for event in yaml.parse(data, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            deepest = max(deepest, depth)
            if depth > _DEPTH:
                break
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    return deepest


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def fail(path: str, node: yaml.Node, key: str, text: str) -> SettingsError:
    """The complaint about this node, to be raised."""
    mark = node.start_mark
    where = f"{path}:{mark.line + 1}" if mark else path
    return SettingsError(f"{where}: {key + ': ' if key else ''}{text}")


def mapping(path: str, node: yaml.Node, key: str, known: tuple[str, ...]) -> dict[str, yaml.Node]:
    """The mapping's values by key; keys whose value is null are left out, as Go's YAML does. `known` empty: the keys
    are names of the user's choice."""
    if not isinstance(node, yaml.MappingNode):
        raise fail(path, node, key, f"expected a mapping{' with ' + ' and '.join(known) if known else ''}")
    found: dict[str, yaml.Node] = {}
    for name_node, value in node.value:
        name = str(name_node.value) if isinstance(name_node, yaml.ScalarNode) else "(not a plain key)"
        full = f"{key}.{name}" if key else name
        if known and name not in known:
            raise fail(path, name_node, full, f"there is no such key{nearest(name, known)}")
        if name in found:
            raise fail(path, name_node, full, "stands here a second time; keep one of the two")
        found[name] = value
    return {name: value for name, value in found.items() if not _is_null(value)}


def scalar(path: str, node: yaml.Node, key: str, parse: Callable[[str], Any]) -> Any:
    """What `parse` makes of the text; its ValueError becomes the complaint."""
    # A YAML number, date or boolean is refused rather than turned back into text: 010 or `no` would not
    # survive.
    if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str":
        raise fail(path, node, key, "expected text; put it in quotes if it looks like something else")
    try:
        return parse(node.value)
    except ValueError as error:
        raise fail(path, node, key, f"{node.value!r}: {error}") from None


def boolean(path: str, node: yaml.Node, key: str) -> bool:
    """true or false."""
    if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:bool":
        raise fail(path, node, key, "expected true or false")
    return str(node.value).lower() in ("true", "yes", "on")


def items(path: str, node: yaml.Node, key: str, parse: Callable[[str], Any]) -> tuple[Any, ...]:
    """A list of texts, each parsed; the same value twice is one."""
    if not isinstance(node, yaml.SequenceNode):
        raise fail(path, node, key, "expected a list")
    found = [scalar(path, item, f"{key}[{index}]", parse) for index, item in enumerate(node.value)]
    return tuple(dict.fromkeys(found))


def nearest(word: str, known: tuple[str, ...]) -> str:
    """ "; did you mean X?" or, where nothing is near, "". Case and punctuation do not count."""

    def flat(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    near = difflib.get_close_matches(flat(word), [flat(name) for name in known], n=1, cutoff=0.6)
    return next((f"; did you mean {name}?" for name in known if near and flat(name) == near[0]), "")
