"""The relation maps of a report: numbers of the heads, gaps between them, and the text of the row that they show."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from pipeline.config import Recipe, load_recipe
from pipeline.report.relation_maps import GAP, colored, relation_maps, spaced
from pipeline.runtime.run_paths import RunPaths
from pipeline.training.checks import open_data
from tests.unit.made_up_run import make_run


@pytest.fixture
def run(tmp_path: Path, tiny_recipe: Path) -> tuple[RunPaths, Recipe, dict[str, Any]]:
    """Files, recipe and run.json of a run on tiny shards, with a tokenizer in its teacher's directory."""
    recipe = load_recipe(tiny_recipe, [])
    return RunPaths(make_run(tmp_path / "run")), recipe, {"data_fingerprint": open_data(recipe).fingerprint}


def text_of(found: str) -> str:
    (text,) = re.findall(r"<blockquote[^>]*>(.*?)</blockquote>", found, re.DOTALL)
    return html.unescape(text)


def test_the_row_is_shown_as_text_and_as_tokens(run: tuple[RunPaths, Recipe, dict[str, Any]]) -> None:
    paths, recipe, about = run
    source = open_data(recipe)
    ids = source.heldout_batch(source.languages[:1]).input_ids_BL[0].tolist()
    tokenizer = AutoTokenizer.from_pretrained(recipe.teacher)
    found = relation_maps(paths, recipe, about)
    assert text_of(found) == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(text_of(found)) > 10
    tokens = re.findall(r"<li>(.*?)</li>", found)
    assert [html.unescape(token) for token in tokens] == tokenizer.convert_ids_to_tokens(ids)
    assert f'lang="{source.languages[0]}"' in found


def test_heads_are_numbered(run: tuple[RunPaths, Recipe, dict[str, Any]]) -> None:
    paths, recipe, about = run
    found = relation_maps(paths, recipe, about)
    first = f"<span>head 1 of {recipe.relations.heads}</span><span>head 2</span></div>"
    assert found.count(first) == 2, "8 x 8 pixels are two heads of a row of four tokens; two steps"
    (data, _) = re.findall(r"data:image/png;base64,(.*?)\"", found)
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.size == (9, 9)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ("fingerprint", "are not those that the run reads"),
        ("data", "no shards found at"),
        ("tokenizer", "is not a directory"),
    ],
)
def test_another_row_is_never_shown(
    run: tuple[RunPaths, Recipe, dict[str, Any]], change: str, cause: str, tmp_path: Path
) -> None:
    paths, recipe, about = run
    if change == "fingerprint":
        about["data_fingerprint"] = "other"
    elif change == "data":
        recipe = dataclasses.replace(recipe, data=str(tmp_path / "nothing"))
    else:
        recipe = dataclasses.replace(recipe, teacher="some/hub-name")
    found = relation_maps(paths, recipe, about)
    assert cause in found
    assert "<blockquote" not in found
    assert found.count("<img") == 2


def test_the_tokenizer_of_the_export_is_enough(run: tuple[RunPaths, Recipe, dict[str, Any]]) -> None:
    """On a machine without the teacher."""
    paths, recipe, about = run
    shown = text_of(relation_maps(paths, recipe, about))
    shutil.copytree(recipe.teacher, paths.files / "student")
    assert text_of(relation_maps(paths, dataclasses.replace(recipe, teacher="some/hub-name"), about)) == shown


def test_gaps_change_no_pixel_of_a_square() -> None:
    grey_HW = np.arange(2 * 4 * 12, dtype=np.uint8).reshape(8, 12) * 2
    with_gaps = spaced(grey_HW, 4)
    assert with_gaps.shape == (9, 14)
    kept = np.delete(np.delete(with_gaps, 4, axis=0), [4, 9], axis=1)
    assert (kept == grey_HW).all()
    assert (with_gaps[4] == GAP).all()
    assert (with_gaps[:, [4, 9]] == GAP).all()
    bright = spaced(np.full((8, 8), 255, dtype=np.uint8), 4)
    assert (bright[:4, :4] == GAP - 1).all(), "the brightest pixels are no gap"
    with Image.open(io.BytesIO(colored(bright))) as picture:
        alpha = np.asarray(picture.convert("RGBA"))[..., 3]
    assert ((alpha == 0) == (bright == GAP)).all()
