"""Parse recipe text into dictionaries, lists and scalars that keep their characters.

YAML 1.1 gives an unquoted scalar a type without knowing its key: `no` (Norwegian) becomes false, `1e-3` stays text, `010` is
8 and `12:30` is 750. Here an unquoted scalar stays `Plain` text. Where the type of its key is not text, `Plain.value` gives the
value of YAML 1.2.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

MOST_SHOWN = 300  # characters
_INTEGER = re.compile(r"[-+]?\d[\d_]*|0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+", re.ASCII)
_FLOAT = re.compile(r"[-+]?(\.\d+|\d[\d_]*(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", re.ASCII)
_NULL = ("", "~", "null", "Null", "NULL")
_TRUTH = {"true": True, "false": False}


class Plain(str):
    """An unquoted scalar with the characters of the file."""

    @property
    def value(self) -> Any:
        """None, bool, int, float or str, as YAML 1.2 reads it. Raises `ValueError` for a number with too many digits."""
        if self in _NULL:
            return None
        if self.lower() in _TRUTH:
            return _TRUTH[self.lower()]
        if _INTEGER.fullmatch(self):
            is_decimal = self.lstrip("+-")[:2].lower() not in ("0x", "0o", "0b")
            return int(self.replace("_", ""), 10 if is_decimal else 0)
        if _FLOAT.fullmatch(self):
            return float(self.replace(".", "", 1) if self[-1] in "fFnN" else self)
        return str(self)


class _Loader(yaml.SafeLoader):
    """As `safe_load`: dictionaries, lists and scalars only. A repeated key is an error, since the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key `{twice}` occurs twice{node.start_mark}")
        return super().construct_mapping(node, deep)

    def construct_text(self, node: yaml.ScalarNode) -> str:
        return Plain(node.value) if node.style is None else str(node.value)


_Loader.yaml_implicit_resolvers = {}  # no scalar has a type, except the key that merges mappings
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)


def parse(text: str) -> Any:
    """The tree of one YAML document. Raises `ValueError` with line and column where it is not valid."""
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:500]
        if "'\\t'" in reason:
            reason += ". Indent with spaces, not with tabs"
        if "expected a single document" in reason:
            reason += ". Keep one, and remove the lines of ---"
        raise ValueError(reason) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file. Raises `UserError` where the file is missing or holds something else."""
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("recipes").glob("*.yaml"))) or "none"
        raise UserError(f"recipe {path} not found. Recipes here: {known}")
    try:
        tree = parse(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(tree, dict):
        kind = "nothing" if tree in (None, "") else "text" if isinstance(tree, str) else "a list"
        raise UserError(f"{path} must hold `key: value` pairs, not {kind}")
    return tree


def shown(override: str) -> str:
    """An override for a message: on one line, and at most `MOST_SHOWN` characters."""
    line = " ".join(override.split())
    return line if len(line) <= MOST_SHOWN else line[:MOST_SHOWN] + "..."


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `a.b=c` in a nested mapping. `c` is read as YAML, so that `null`, `[1, 2]` and `5e-4` work."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {shown(override)}: write it as --set key=value or --set section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        child = tree.get(section)
        if child is None or (isinstance(child, Plain) and child.value is None):  # absent, or a key without a value
            child = tree[section] = {}
        if not isinstance(child, dict):
            raise UserError(f"--set {shown(override)}: `{section}` is a value, not a section")
        tree = child
    try:
        value = parse(text)
    except ValueError as error:
        raise UserError(f"--set {shown(override)}: the value is not readable YAML: {error}") from None
    if isinstance(value, Plain) and value != text.strip():  # YAML read the rest as a comment
        quoted = shlex.quote(f"{key}={json.dumps(text.strip(), ensure_ascii=False)}")
        raise UserError(f"--set {shown(override)}: YAML reads only `{shown(value)}`; quote it: --set {quoted}")
    tree[last] = Plain() if value is None else value
