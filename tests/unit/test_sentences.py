"""What a run with `relations.tail: pooled` says before it starts, and what it counts in a plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import load_recipe
from pipeline.distillation.models.sentence_files import FoundSettings, SentenceSettings
from pipeline.errors import UserError
from pipeline.planning.meta_models import build_encoders
from pipeline.training.sentences import batch_warnings, check_sentences, resolved, sentence_identity, settings_of

POOLED = "relations.tail=pooled"
MEAN = FoundSettings(SentenceSettings(), "the modules.json of X")
CLS = FoundSettings(SentenceSettings("cls"), "the modules.json of X", ["Dense"])
E5 = FoundSettings(SentenceSettings(prompts={"query": "query: ", "document": "passage: "}), "the modules.json of X")


@pytest.mark.parametrize(
    ("found", "overrides", "words"),
    [
        (MEAN, ["documents=separate"], []),
        (MEAN, [], ["one vector per row of 32 tokens", "--set documents=separate"]),
        (CLS, ["documents=separate"], ["Dense", "of its first document", "--set relations.pooling=mean"]),
        (E5, ["documents=separate"], ["query 'query: ', document 'passage: '", "without prefix", "the export has"]),
    ],
)
def test_a_run_says_what_a_sentence_is(
    tiny_recipe: Path, found: FoundSettings, overrides: list[str], words: list[str]
) -> None:
    what, warnings = check_sentences(load_recipe(tiny_recipe, [POOLED, *overrides]), found, 4, 48)
    assert what.startswith(f"{found.settings.pooling} pooling (the modules.json of X), compared by cosine")
    assert "projected from 24 to 48 channels" in what
    assert bool(warnings) == bool(words)
    for text in words:
        assert text in " ".join(warnings)


def test_similarity_needs_two_rows_and_no_projection(tiny_recipe: Path) -> None:
    recipe = load_recipe(tiny_recipe, [POOLED, "relations.pooled_distance=similarity"])
    what, _ = check_sentences(recipe, MEAN, 2, 48)
    assert "projected" not in what
    with pytest.raises(UserError, match="one row"):
        check_sentences(recipe, MEAN, 1, 48)
    check_sentences(load_recipe(tiny_recipe, [POOLED]), MEAN, 1, 48)


def test_another_micro_batch_changes_similarities(tiny_recipe: Path) -> None:
    state = {"deepspeed": {"train_micro_batch_size_per_gpu": 4}, "world_size": 2}
    similarity = load_recipe(tiny_recipe, [POOLED, "relations.pooled_distance=similarity"])
    assert batch_warnings(state, similarity, 8) == []
    assert "has 4 rows, and had 8" in batch_warnings(state, similarity, 4)[0]
    assert batch_warnings({}, similarity, 4) == []
    assert batch_warnings(state, load_recipe(tiny_recipe, [POOLED]), 4) == []


def test_runs_without_sentence_vectors_read_no_files(tiny_recipe: Path) -> None:
    recipe = load_recipe(tiny_recipe, ["teacher=/nowhere", "relations.tail=mse"])
    found = settings_of(recipe)
    assert found is None
    assert sentence_identity(found) == {}
    assert resolved(recipe.relations, found) is recipe.relations


def test_the_pooling_of_the_run_is_in_its_identity(tiny_recipe: Path) -> None:
    recipe = load_recipe(tiny_recipe, [POOLED])
    assert sentence_identity(settings_of(recipe)) == {"pooling of sentence vectors": "mean"}
    assert resolved(recipe.relations, settings_of(recipe)).pooling == "mean"
    assert recipe.relations.pooling == "auto"


def test_a_plan_counts_the_projection(tiny_recipe: Path) -> None:
    sizes = [
        build_encoders(load_recipe(tiny_recipe, [f"relations.tail={tail}"])).sizes for tail in ("relation", "pooled")
    ]
    assert sizes[1].trained - sizes[0].trained == 48 * 24
    assert sizes[1].untrained == sizes[0].untrained
