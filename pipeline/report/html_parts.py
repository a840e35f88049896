"""Parts of the report as HTML: the page around its sections, tables, relation maps.

In: titles, text and figures of a run, none of which is trusted: all of it is escaped. Out: HTML that loads nothing.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MAPS_COLORS = "magma"
LOADS_NOTHING = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # browsers enforce this policy


@dataclass(frozen=True)
class Page:
    """The top of a page: its name, one line about it, and figures, each under a label. `subtitle` is HTML."""

    name: str
    subtitle: str
    facts: Mapping[str, str]


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
        f"<p>{page.subtitle}</p></header>\n<nav>{links}</nav>\n{fact_cells(page.facts)}\n{body}\n"
        "</body></html>\n"
    )


def fact_cells(facts: Mapping[str, str]) -> str:
    """The figures at the top."""
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


def relation_maps(board: Path) -> str:
    """The first and the last image of every relation, from the TensorBoard files in `board`."""
    if not board.is_dir():
        return ""
    events = EventAccumulator(str(board), size_guidance={"images": 0, "scalars": 1})
    events.Reload()
    parts = []
    for tag in events.Tags()["images"]:
        images = events.Images(tag)
        for image in (images[0], images[-1])[: len(images)]:
            caption = f"{html.escape(tag.removeprefix('relations/'))}, step {image.step}"
            data = base64.b64encode(colored(image.encoded_image_string)).decode()
            parts.append(
                f"<figure><figcaption>{caption}</figcaption>"
                f'<img alt="relation map {caption}" src="data:image/png;base64,{data}"></figure>'
            )
    return f'<div class="maps">{"".join(parts)}</div>' if parts else ""


def colored(png: bytes) -> bytes:
    """The grey PNG as a PNG with a palette from dark violet to bright yellow."""
    grey = Image.open(io.BytesIO(png)).convert("L")
    picture = Image.fromarray(np.asarray(grey))
    palette = (matplotlib.colormaps[MAPS_COLORS](np.arange(256))[:, :3] * 255).astype(np.uint8)
    picture.putpalette(palette.tobytes())
    out = io.BytesIO()
    picture.save(out, format="png", optimize=True)
    return out.getvalue()
