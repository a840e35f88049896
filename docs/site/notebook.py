"""A notebook as Markdown: its text, its code, and what was stored of its output."""

from __future__ import annotations

import json
from typing import Any


def notebook_as_markdown(source: str) -> str:
    """The Markdown of a notebook in nbformat 4.

    Args:
        source: the JSON of an `.ipynb` file.

    Returns:
        Text cells as they are, code and printed output as blocks, pictures as data.
    """
    parts = []
    for cell in json.loads(source)["cells"]:
        text = "".join(cell["source"]).rstrip()
        if cell["cell_type"] == "code":
            parts += [_block(text, "python"), *(_output(output) for output in cell.get("outputs", ()))]
        else:
            parts.append(text)
    return "\n\n".join(part for part in parts if part)


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![output](data:image/png;base64,{''.join(data['image/png']).replace(chr(10), '')})"
    return _block("".join(output.get("text", data.get("text/plain", ()))).rstrip(), "text")


def _block(text: str, language: str) -> str:
    fence = "~" * 8
    return f"{fence} {language}\n{text}\n{fence}" if text else ""
