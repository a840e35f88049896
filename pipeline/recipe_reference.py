"""Print the reference of all recipe keys: the content of docs/recipes.md.

    python -m pipeline recipes > docs/recipes.md

The description of a key is the comment on the line of its field, that of a section the docstring of its dataclass. A test
fails where the page is not up to date.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config import Recipe, load_recipe
from pipeline.installed import FILES, ROOT

INTRODUCTION = """# Recipes

This page is generated from the dataclasses and from `recipes/` by `python -m pipeline recipes > docs/recipes.md`. Change those,
not this page.

A recipe is a YAML file. A key that it leaves out has its default. `--set key=value` and `--set section.key=value` override it.
An unknown key is an error that names the nearest known key. Batch, learning rate and clipping belong to the recipe; ZeRO stage,
precision, communication and offload belong to the DeepSpeed JSON (`ds_configs/README.md`). `docs/reliability.md` lists what may
change when a run resumes. To try a recipe: `deepspeed pipeline/train.py --deepspeed ds_configs/zero2.json --recipe FILE --dry-run`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This verb has no options."""


def run(arguments: argparse.Namespace) -> None:
    print(page(), end="")


def page() -> str:
    """The content of docs/recipes.md."""
    sections = [INTRODUCTION, "## Available recipes\n", recipe_table(), "## Keys\n", section(Recipe, "")]
    return "\n".join(sections)


def recipe_table() -> str:
    """One row per file of recipes/."""
    rows = [["recipe", "teacher", "read at layer", "relation heads", "student", "starts from", "steps"]]
    for path in sorted((FILES / "recipes").glob("*.yaml")):
        recipe = load_recipe(path, [])
        facts = [
            (
                r.relations.teacher_taps or "last",
                r.relations.heads,
                f"{r.student.layers} x {r.student.hidden}",
                r.student.init,
            )
            for r in recipe.members().values()
        ]
        cells = [", ".join(dict.fromkeys(map(str, of_all))) for of_all in zip(*facts, strict=True)]
        rows.append([f"[{path.stem}](../recipes/{path.name})", recipe.teacher, *cells, f"{recipe.steps:,}"])
    return markdown(rows)


def section(cls: type, prefix: str) -> str:
    """A dataclass's keys as a table, then the sections inside it."""
    comments, hints = field_comments(cls), typing.get_type_hints(cls)
    rows, inner = [["key", "type", "default", "description"]], []
    for field in dataclasses.fields(cls):
        nested = next(dataclasses_in(hints[field.name]), None)
        name = f"{prefix}{field.name}"
        if nested is hints[field.name]:
            inner.append((nested, f"{name}."))
            rows.append([f"`{name}`", "section", "", f"below: {first_line(nested)}"])
            continue
        if nested is not None:
            inner.append((nested, f"{name}[]."))
        rows.append([f"`{name}`", f"`{type_text(field)}`", default_text(field), as_text(comments[field.name])])
    parts = [markdown(rows)]
    for nested, deeper in inner:
        parts += [f"### `{deeper.rstrip('.')}`\n", f"{first_line(nested)} (`{source_path(nested)}`)\n"]
        parts.append(section(nested, deeper))
    return "\n".join(parts)


def dataclasses_in(hint: Any) -> Iterator[type]:
    """The dataclasses in a type hint."""
    if dataclasses.is_dataclass(hint):
        yield typing.cast(type, hint)
    for argument in typing.get_args(hint):
        yield from dataclasses_in(argument)


def field_comments(cls: type) -> dict[str, str]:
    """The comment on the line of each field. A field without one is an error: its row would have no description."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines, body = source.splitlines(), typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    comments = {
        ast.unparse(node.target): lines[(node.end_lineno or node.lineno) - 1].partition("  # ")[2]
        for node in body
        if isinstance(node, ast.AnnAssign)
    }
    sections = {f.name for f in dataclasses.fields(cls) if dataclasses.is_dataclass(typing.get_type_hints(cls)[f.name])}
    missing = [name for name, comment in comments.items() if not comment and name not in sections]
    assert not missing, f"{cls.__name__}: write a comment on the line of {', '.join(missing)}, for docs/recipes.md"
    return comments


def type_text(field: dataclasses.Field) -> str:
    """The annotation in YAML's terms, with `a or b` for literals."""
    text = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace(", ", " or "), str(field.type))
    return text.replace('"', "").replace("'", "").replace(" | None", " or null")


def default_text(field: dataclasses.Field) -> str:
    """The default as written in YAML."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    return f"`{json.dumps(value)}`" if value != [] else "`[]`"


def as_text(comment: str) -> str:
    """A comment in YAML's terms, with `<` escaped, since `<s>` is not markup."""
    return comment.replace("None:", "null:").replace("<", "&lt;")


def first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")


def source_path(cls: type) -> str:
    return str(Path(inspect.getfile(cls)).resolve().relative_to(ROOT))


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table whose first row is its header."""
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body, ""])
