"""Mutations of valid input for the fuzz targets. A case is two integers, so hypothesis can shrink and print it.

In a tree (of JSON or YAML), keys are deleted and values replaced by other types, absurd numbers and deeply nested ones. In a
text, bytes are flipped, deleted, repeated and inserted.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e308, -1e308, 1e-320, float("inf"), float("-inf"), float("nan"), 2**31, 2**63,
    -(2**63) - 1, 10**25, 10**400, "", " ", "x", "\0", "é", "\ud800", "../../etc/passwd", "/dev/zero", "a" * 5000, "null", "1e5",
    "0x10", "yes", "~", [], {}, [[]], [None], [1, "a", None], {"a": {}}, {"": 1}, {"a": [1]}, list(range(2000)), ["a"] * 50,
]  # fmt: skip
CHUNKS = [
    b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\n\n", b"\t", b'"', b"{", b"}", b"[", b"]", b":", b",", b"&a ", b"*a ",
    b"!!python/object/apply:os.system ", b"---\n", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"\\ud800", b"\xe2\x80\xa8",
    b"[" * 20000, b'{"a":' * 20000, b"- " * 3000, b"<<: ", b"#", b"'", b"\x1a",
]  # fmt: skip


def mutated_tree(tree: Any, seed: int, times: int) -> Any:
    """`tree` with `times` places changed."""
    choice, tree = random.Random(seed), copy.deepcopy(tree)
    for _ in range(times):
        tree = _change(choice, tree)
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of the tree."""
    found, todo = [], [tree]
    while todo:
        node = todo.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            todo.append(node[key])
        if len(found) > 3000:
            break
    return found


def _change(choice: random.Random, tree: Any) -> Any:
    places = _places(tree)
    if not places or choice.random() < 0.02:
        return choice.choice(ODD_VALUES)
    node, key = choice.choice(places)
    kind = choice.random()
    if kind < 0.5:
        node[key] = copy.deepcopy(choice.choice(ODD_VALUES))
    elif kind < 0.65:
        del node[key]
    elif kind < 0.75 and isinstance(node, dict):
        node[choice.choice(["", "x", "steps", str(key) + "x", str(key).upper(), "\0", "__class__"])] = node.pop(key)
    elif kind < 0.85:
        other, place = choice.choice(places)
        node[key] = copy.deepcopy(other[place]) if place in _keys(other) else None
    elif kind < 0.92 and isinstance(node, list):
        node.extend(copy.deepcopy(node))
    else:
        node[key] = [node[key]] if choice.random() < 0.5 else {"a": node[key]}
    return tree


def _keys(node: Any) -> Any:
    return node if isinstance(node, dict) else range(len(node))


def mutated_bytes(content: bytes, seed: int, times: int) -> bytes:
    """`content` with `times` places changed."""
    choice, text = random.Random(seed), bytearray(content)
    for _ in range(times):
        start = choice.randrange(len(text) + 1)
        stop = min(len(text), start + choice.choice([1, 1, 1, 4, 20, 200]))
        kind = choice.randrange(6)
        if kind == 0 and start < len(text):
            text[start] ^= 1 << choice.randrange(8)
        elif kind == 1:
            del text[start:stop]
        elif kind == 2:
            text[start:start] = text[start:stop] * choice.choice([1, 2, 50])
        elif kind == 3:
            text[start:stop] = choice.choice(CHUNKS)
        elif kind == 4:
            text[start:start] = choice.choice(CHUNKS)
        else:
            del text[start:]
    return bytes(text)


def mutated_json(tree: Any, seed: int, times: int) -> bytes:
    """A JSON file with a changed tree, changed bytes, or a key twice."""
    kind = seed % 4
    if kind == 3:
        return mutated_bytes(json.dumps(tree, indent=1).encode(), seed, times)
    text = json.dumps(mutated_tree(tree, seed, times), indent=1)
    if kind == 2 and text.startswith("{\n "):
        first, _, rest = text.partition(",\n")
        text = f"{first},{first[1:]},\n{rest}"
    return text.encode("utf-8", "surrogatepass")
