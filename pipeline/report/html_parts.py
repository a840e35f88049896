"""Parts of the report as HTML: the page around its sections, tables.

In: titles, text and figures of a run, none of which is trusted: all of it is escaped. Out: HTML that loads nothing.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LOADS_NOTHING = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # browsers enforce this policy


@dataclass(frozen=True)
class Page:
    """The top of a page: its name, one line about it, and figures, each under a label. `subtitle` and `state` are HTML."""

    name: str
    subtitle: str
    facts: Mapping[str, str]
    state: str = ""


def page_of(page: Page, sections: Sequence[tuple[str, str, str]]) -> str:
    """The complete page.

    Args:
        sections: title, note and content of each, all HTML; a section without content is left out
    """
    shown = [(title, note, content) for title, note, content in sections if content]
    body = "\n".join(
        f'<section id="{anchor(title)}"><h2>{title}</h2>'
        + (f'\n<p class="note">{note}</p>' if note else "")
        + f"\n{content}</section>"
        for title, note, content in shown
    )
    links = "".join(f'<a href="#{anchor(title)}">{title}</a>' for title, _, _ in shown)
    name = html.escape(page.name)
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{LOADS_NOTHING}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{name}</title><style>{style}</style></head>\n<body>\n<header><h1>{name}</h1>\n"
        f"<p>{page.subtitle}</p></header>\n{page.state}\n{fact_cells(page.facts)}\n<nav>{links}</nav>\n{body}\n"
        "</body></html>\n"
    )


def fact_cells(facts: Mapping[str, str]) -> str:
    """The figures at the top."""
    if not facts:
        return ""
    cells = "".join(
        f'<div class="fact">{html.escape(label)}<b>{html.escape(text)}</b></div>' for label, text in facts.items()
    )
    return f'<div class="facts">{cells}</div>'


def anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9_+]+", "-", title.lower())


def facts_table(rows: dict[str, str]) -> str:
    """A table with one label and one figure per line."""
    cells = "\n".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in rows.items())
    return f'<table class="facts-table">{cells}</table>'


def table(header: list[str], rows: list[list[str]], kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>\n{body}</table></div>'
