"""The pictures of the relations, with the numbers of their heads and the text of their row.

In: the TensorBoard files of a student, and of its row the shards and a tokenizer, where they are at hand. Out: HTML.
"""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.shards import DataError
from pipeline.config import Recipe
from pipeline.distillation.models.loading import load_tokenizer
from pipeline.errors import UserError
from pipeline.report.owners import EXPORT
from pipeline.runtime.run_paths import RunPaths
from pipeline.training.checks import open_data

COLORS = "magma"
GAP = 255  # the value of pixels between two squares


def relation_maps(paths: RunPaths, recipe: Recipe | None, about: dict[str, Any]) -> str:
    """The first and the last image of every relation, from the TensorBoard files, and the row that they show.

    Args:
        recipe: None where the run directory has none
        about: content of run.json
    """
    if not paths.tensorboard.is_dir():
        return ""
    events = EventAccumulator(str(paths.tensorboard), size_guidance={"images": 0, "scalars": 1})
    events.Reload()
    num_heads = recipe.relations.heads if recipe else None
    parts = []
    for tag in events.Tags()["images"]:
        images = events.Images(tag)
        for image in (images[0], images[-1])[: len(images)]:
            caption = f"{html.escape(tag.removeprefix('relations/'))}, step {image.step:,}"
            parts.append(_figure(image.encoded_image_string, caption, num_heads))
    return f'{_row(paths, recipe, about)}<div class="maps">{"".join(parts)}</div>' if parts else ""


def _figure(png: bytes, caption: str, num_heads: int | None) -> str:
    """One picture below the numbers of its heads: squares next to each other, those of the teacher above the student's."""
    grey_HW = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    length = max(grey_HW.shape[0] // 2, 1)
    columns = max(grey_HW.shape[1] // length, 1)
    of_all = f" of {num_heads}" if num_heads else ""
    heads = "".join(f"<span>head {number}{of_all if number == 1 else ''}</span>" for number in range(1, columns + 1))
    data = base64.b64encode(colored(spaced(grey_HW, length))).decode()
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<div class="scroll"><div class="map"><div class="heads">{heads}</div>'
        '<div class="models"><span>teacher</span><span>student</span></div>'
        f'<img alt="relation map {caption}" src="data:image/png;base64,{data}"></div></div></figure>'
    )


def spaced(grey_HW: np.ndarray, length: int) -> np.ndarray:
    """The picture with `GAP` between its squares of `length` pixels, [2 length + gap, columns (length + gap) - gap]."""
    gap = max(length // 32, 1)
    spaced_HW = np.minimum(grey_HW, GAP - 1)
    for axis in (0, 1):
        edges = np.arange(length, grey_HW.shape[axis], length)
        spaced_HW = np.insert(spaced_HW, np.repeat(edges, gap), GAP, axis=axis)
    return spaced_HW


def colored(grey_HW: np.ndarray) -> bytes:
    """Grey values as a PNG with a palette from dark violet to bright yellow, in which `GAP` is transparent."""
    picture = Image.fromarray(grey_HW)
    palette = (matplotlib.colormaps[COLORS](np.arange(256))[:, :3] * 255).astype(np.uint8)
    picture.putpalette(palette.tobytes())
    out = io.BytesIO()
    picture.save(out, format="png", optimize=True, transparency=GAP)
    return out.getvalue()


def _row(paths: RunPaths, recipe: Recipe | None, about: dict[str, Any]) -> str:
    """The text of the row that the maps show, and its tokens; or why it is not shown."""
    if recipe is None:
        return ""
    try:
        language, ids = shown_row(recipe, about)
        tokenizer = load_tokenizer(_tokenizer_of(paths, recipe), "student")
    except (UserError, DataError, OSError) as error:
        cause = html.escape(str(error).partition(". ")[0])
        return f'<p class="note">The text of the row is not shown: {cause}.</p>'
    text = html.escape(tokenizer.decode(ids, skip_special_tokens=True))
    tokens = "".join(f"<li>{html.escape(str(token))}</li>" for token in tokenizer.convert_ids_to_tokens(ids))
    return (
        f'<blockquote class="row" lang="{html.escape(language)}" dir="auto">{text}</blockquote>'
        f'<p class="note">This is the row: held-out text of {html.escape(language)}, {len(ids):,} tokens, from left to right '
        "and from top to bottom in every square.</p>"
        f'<details><summary>its {len(ids):,} tokens</summary><ol class="tokens" start="0">{tokens}</ol></details>'
    )


def shown_row(recipe: Recipe, about: dict[str, Any]) -> tuple[str, list[int]]:
    """Language and ids of the row that training draws: the first held-out one of the first language.

    Raises:
        UserError, DataError: the shards are not there, or are not those that the run reads
    """
    source = open_data(recipe)
    if source.fingerprint != about.get("data_fingerprint"):
        raise UserError(f"the shards at {recipe.data} are not those that the run reads. Restore those")
    language = source.languages[0]
    rows_BL = source.heldout_batch([language]).input_ids_BL
    if not len(rows_BL):
        raise UserError(f"{language} has no held-out row")
    return language, rows_BL[0].tolist()


def _tokenizer_of(paths: RunPaths, recipe: Recipe) -> Path:
    """A directory with the student's tokenizer: its export, or the one that the recipe names. Nothing is fetched."""
    export = paths.files / EXPORT
    found = next((place for place in (export, Path(recipe.tokenizer)) if place.is_dir()), None)
    if found is None:
        raise UserError(f"the tokenizer of {recipe.tokenizer} is not a directory here. Export the student to {export}")
    return found
