"""The metadata of a model card, as the hub's own library reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from pipeline.distillation.models.teacher import load_encoder
from pipeline.export.card import CARD_FILE, write_card
from pipeline.export.card_evaluation import Exported
from pipeline.export.card_metadata import front_matter, license_of
from pipeline.export.hf import Export, export_student

LINEAGE = {
    "teacher": "owner/teacher",
    "license": "mit",
    "data_sets": ["owner/texts", "/a/directory"],
    "steps": 12,
    "languages": ["de"],
}


def test_what_the_hub_asks_for(tmp_path: Path) -> None:
    card = ModelCard(front_matter(LINEAGE, Exported(tmp_path, tmp_path), []))
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("mit", "owner/teacher", ["owner/texts"])
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "feature-extraction")
    assert "text" in card.data.widget[0]
    assert card.data.eval_results is None
    (tmp_path / "modules.json").touch()
    card = ModelCard(
        front_matter({**LINEAGE, "license": None, "teacher": str(tmp_path)}, Exported(tmp_path, tmp_path), [])
    )
    assert (card.data.license, card.data.base_model, card.data.pipeline_tag) == ("unknown", None, "sentence-similarity")
    assert card.data.widget[0].keys() == {"source_sentence", "sentences"}


def test_figures_of_this_export_and_of_no_other(tmp_path: Path) -> None:
    student, evaluation, run = (tmp_path / name for name in ("student", "evaluation", "run"))
    for directory in (student, evaluation, run):
        directory.mkdir()
    tasks = {
        "retrieval": {
            str(student): {"mean": {"output": 0.9, "values": 0.8}},
            "artifacts/teacher": {"mean": {"output": 0.97}},
        },
        "xnli": {f"{student}@2": {"mean": {"accuracy": 71.25}}},
        "sts": {"another": {"mean": {"output": 0.5}}},
        "tagging": {str(student): {"mean": {"f1": float("nan")}}},
        "speed": {str(student): {}},
    }
    (evaluation / "evaluation.json").write_text(json.dumps({"models": {}, "tasks": tasks}))
    (run / "demo.json").write_text(json.dumps({"steps": 11, "after_mean": 0.1}))
    card = ModelCard(front_matter(LINEAGE, Exported(student, student), [run, evaluation]))
    found = {(one.dataset_type, one.task_type, one.metric_type, one.metric_value) for one in card.data.eval_results}
    assert found == {
        ("retrieval", "text-retrieval", "accuracy", 0.9),
        ("xnli", "text-classification", "accuracy", 71.25),
    }
    assert card.data.model_name == "MiniLMv2 student of teacher"
    assert card.data.metrics == ["accuracy"]
    (run / "demo.json").write_text(json.dumps({"steps": 12, "after_mean": 0.95}))
    (one,) = ModelCard(front_matter(LINEAGE, Exported(student, student), [run])).data.eval_results
    assert (one.metric_type, one.metric_value) == ("accuracy", 0.95)
    cut = {**LINEAGE, "trimmed": {"languages": ["de"]}}  # the demo has measured the student before it was cut
    assert ModelCard(front_matter(cut, Exported(student, student), [run])).data.eval_results is None


@pytest.mark.parametrize(("card", "name"), [
    ("---\nlicense: apache-2.0\ntags: [x]\n---\n# A teacher", "apache-2.0"),
    ("---\nlicense: |\n  two\n  lines\n---\n", None),
    ("---\nlicense: [mit]\n---\n", None),
    ("---\nlicense: !!python/object:os.system {}\n---\n", None),
    ("license: mit", None),
    ("", None),
])  # fmt: skip
def test_the_license_of_a_teacher(card: str, name: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert license_of(str(tmp_path)) == name
    assert license_of("owner/not-in-the-cache") is None


def test_a_real_card_is_one(tiny_teacher: Path, tmp_path: Path) -> None:
    model = load_encoder(tiny_teacher)
    lineage = {**LINEAGE, "recipe": {"steps": 12}}
    output = export_student(Export(model.state_dict(), model.config, str(tiny_teacher), lineage), tmp_path / "student")
    write_card(output)
    card = ModelCard.load(output / CARD_FILE)
    assert (card.data.license, card.data.base_model) == ("mit", "owner/teacher")
