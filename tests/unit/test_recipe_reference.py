"""docs/recipes.md is generated from the current dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pipeline.recipe_reference import field_comments, page
from tests.conftest import REPO


def test_the_page_is_up_to_date() -> None:
    assert (REPO / "docs" / "recipes.md").read_text(encoding="utf-8") == page(), (
        "docs/recipes.md is not up to date: run python -m pipeline recipes > docs/recipes.md"
    )


def test_a_key_without_a_comment_is_rejected() -> None:
    @dataclass
    class Section:
        described: int = 1  # a description
        undescribed: int = 2

    with pytest.raises(AssertionError, match="a comment on the line of undescribed"):
        field_comments(Section)
