"""Recipe text to a tree of dictionaries, lists and scalars that keep the characters they were written with.

YAML types a bare scalar before anybody knows which key wants it: `no` (Norwegian) becomes false, `1e-3` stays text, `010` is
eight and `12:30` is 750. Here a bare scalar stays `Plain` text, and `Plain.value` gives the type that YAML 1.2 has for it
once the key's own type is known not to be text. Used by config.py.
"""

from __future__ import annotations

import re
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
    """A scalar without quotes, as it stands in the file."""

    @property
    def value(self) -> Any:
        """None, bool, int, float or str, as YAML 1.2 reads it. Raises `ValueError` for an endless number."""
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
    """Dictionaries, lists and scalars only, as `safe_load`, and no key twice: the second would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key `{twice}` is there twice{node.start_mark}")
        return super().construct_mapping(node, deep)

    def construct_text(self, node: yaml.ScalarNode) -> str:
        return Plain(node.value) if node.style is None else str(node.value)


_Loader.yaml_implicit_resolvers = {}  # no scalar has a type yet, but for the key that merges mappings
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)


def parse(text: str) -> Any:
    """The tree of one YAML document. Raises `ValueError` with line and column where it is none."""
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:500]
        if "'\\t'" in reason:
            reason += ". Indent with spaces, not with tabs"
        if "expected a single document" in reason:
            reason += ". Keep one, and take out the lines of ---"
        raise ValueError(reason) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file; a missing file or anything but a mapping is a `UserError`."""
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("recipes").glob("*.yaml"))) or "none"
        raise UserError(f"there is no recipe at {path}. Recipes here: {known}")
    try:
        tree = parse(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a byte order mark
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(tree, dict):
        kind = "nothing" if tree in (None, "") else "text" if isinstance(tree, str) else "a list"
        raise UserError(f"{path} must hold `key: value` pairs, not {kind}")
    return tree


def shown(override: str) -> str:
    """An override in a message: one line, and no more of it than tells which it is."""
    line = " ".join(override.split())
    return line if len(line) <= MOST_SHOWN else line[:MOST_SHOWN] + "..."


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put `a.b=c` into a nested mapping; `c` is read as YAML, so `null`, `[1, 2]` and `5e-4` work."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {shown(override)}: write it as --set key=value or --set section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {shown(override)}: `{section}` is a value, not a section")
        tree = child
    try:
        value = parse(text)
    except ValueError as error:
        raise UserError(f"--set {shown(override)}: the value is not readable YAML: {error}") from None
    if isinstance(value, Plain) and value != text.strip():  # the rest was taken for a comment
        raise UserError(
            f"""--set {shown(override)}: YAML reads `{shown(value)}` and no more; quote it: --set '{key}="{shown(text)}"'"""
        )
    tree[last] = Plain() if value is None else value
