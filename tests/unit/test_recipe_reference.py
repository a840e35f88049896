"""docs/recipes.md is what the dataclasses say now."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pipeline.recipe_reference import field_comments, page
from tests.conftest import REPO


def test_the_page_is_not_stale() -> None:
    assert (REPO / "docs" / "recipes.md").read_text(encoding="utf-8") == page(), (
        "docs/recipes.md is stale: python -m pipeline recipes > docs/recipes.md"
    )


def test_a_key_without_a_comment_is_refused() -> None:
    @dataclass
    class Silent:
        told: int = 1  # what it is
        untold: int = 2

    with pytest.raises(AssertionError, match="a comment beside untold"):
        field_comments(Silent)
