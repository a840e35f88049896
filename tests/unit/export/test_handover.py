"""The config, tokenizer, lineage and card of an export: dropout, lengths, layers, labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.config import Recipe, as_tree, recipe_to_yaml
from pipeline.data.tokenizer_hash import tokenizer_sha256
from pipeline.distillation.config import LayerPair, RelationsConfig
from pipeline.distillation.models.architectures import architecture_of
from pipeline.distillation.models.student import StudentConfig, build_student, dropout_of
from pipeline.distillation.models.teacher import load_encoder
from pipeline.errors import UserError
from pipeline.evaluation.encoder import load_encoder as load_for_evaluation
from pipeline.export.card import length_note, lineage_of, model_card
from pipeline.export.handover import hand_over, longest_input
from pipeline.export.hf import Export, export_student
from pipeline.training.student_start import trained_length
from tests.tiny_encoders import CONFIGS, random_rows, tiny_encoder

STATE = {"step": 7, "samples": 56, "data_fingerprint": "d", "recipe_fingerprint": "r", "precision": "fp32"}
RUN = {"teacher": "a/teacher", "languages": ["de"], "git_commit": "c", "packages": {"torch": "2"}}
SHAPE = {"layers": 2, "hidden": 24, "heads": 4}


# -- dropout and other settings of the config


def run_with(student) -> dict:
    return {**RUN, "dropout": {"distillation": {}, "config": student.own_dropout}}


@pytest.mark.parametrize("family", CONFIGS)
def test_only_the_shape_differs_from_the_teachers_config(family: str, tmp_path: Path) -> None:
    """The dropout of the distillation is not exported, and the student can be fine-tuned as exported."""
    teacher = tiny_encoder(family)
    for number, key in enumerate(architecture_of(teacher.config).dropout_keys, start=1):
        setattr(teacher.config, key, number / 10)
    student = build_student(teacher, StudentConfig(**SHAPE, dropout=0.0), seed=0)
    config = student.model.config
    assert set(dropout_of(config).values()) == {0.0}
    config.to_json_file(tmp_path / "student_config.json", use_diff=False)
    config = AutoConfig.from_pretrained(tmp_path / "student_config.json")
    found = hand_over(config, run_with(student))
    assert found == {"distillation": dict.fromkeys(dropout_of(config), 0.0), "config": dropout_of(teacher.config)}
    shape = {"hidden_size", "dim", "num_hidden_layers", "n_layers", "layer_types", "dtype", "pooler_hidden_size"}
    ours, theirs = config.to_dict(), teacher.config.to_dict()
    assert {key for key in ours if ours[key] != theirs.get(key)} - shape <= {"_name_or_path"}
    config.save_pretrained(tmp_path / "student")
    assert "_name_or_path" not in json.loads((tmp_path / "student" / "config.json").read_text())
    classifier = AutoModelForSequenceClassification.from_config(config).train()
    assert classifier(input_ids=random_rows(2, 9)).logits.shape == (2, 2)
    drops = {module.p for module in classifier.modules() if isinstance(module, torch.nn.Dropout)}
    assert drops & set(dropout_of(teacher.config).values())


def test_labels_of_the_teachers_head_are_not_exported() -> None:
    teacher = tiny_encoder("bert", id2label={0: "bad", 1: "fair", 2: "good"}, problem_type="regression")
    teacher.config.output_hidden_states = True
    student = build_student(teacher, StudentConfig(**SHAPE), seed=0)
    config = student.model.config
    hand_over(config, run_with(student))
    assert (config.num_labels, config.problem_type, config.output_hidden_states) == (2, None, False)
    assert "good" not in config.label2id


def test_a_student_of_another_architecture_has_the_dropout_of_that_architecture() -> None:
    student = build_student(tiny_encoder("bert"), StudentConfig(**SHAPE, family="distilbert", dropout=0.0), seed=0)
    hand_over(student.model.config, run_with(student))
    assert dropout_of(student.model.config) == {"dropout": 0.1, "attention_dropout": 0.1}


def test_a_run_without_recorded_dropout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is read from the teacher if available; otherwise a warning names the settings."""
    teacher = tiny_encoder("bert", hidden_dropout_prob=0.2)
    teacher.save_pretrained(tmp_path / "teacher")
    run = {**RUN, "teacher": str(tmp_path / "teacher")}
    student = build_student(teacher, StudentConfig(**SHAPE, dropout=0.0), seed=0)
    capsys.readouterr()
    assert hand_over(student.model.config, run)["config"]["hidden_dropout_prob"] == 0.2
    assert capsys.readouterr().err == ""
    (tmp_path / "teacher" / "config.json").unlink()
    student = build_student(teacher, StudentConfig(**SHAPE, dropout=0.0), seed=0)
    assert hand_over(student.model.config, run)["config"]["hidden_dropout_prob"] == 0.0
    told = capsys.readouterr().err
    assert "config.json keeps the distillation's" in told
    assert "hidden_dropout_prob, attention_probs_dropout_prob" in told


# -- which layers were matched


def lineage(recipe: Recipe, **run) -> dict:
    return lineage_of({**RUN, **run}, STATE, recipe_to_yaml(recipe))


def test_the_lineage_names_the_layers() -> None:
    both = lineage(Recipe(), matched_layers=[[12, 6]])
    assert (both["teacher_layer"], both["student_layer"]) == (12, 6)
    assert "matched_layers" not in both
    old = lineage(Recipe(relations=RelationsConfig(teacher_layer=9)))  # of a run that did not record them
    assert (old["teacher_layer"], old["student_layer"]) == (9, "last")


def test_the_lineage_names_every_pair_of_several_layers() -> None:
    pairs = [LayerPair(8, 2, 0.5), LayerPair(12, 4)]
    found = lineage(Recipe(relations=RelationsConfig(layers=pairs)), matched_layers=[[8, 2], [12, 4]])
    assert (found["teacher_layer"], found["student_layer"]) == ([8, 12], [2, 4])
    assert found["matched_layers"] == {
        "teacher 8 with student 2, weight": 0.5,
        "teacher 12 with student 4, weight": 1.0,
    }
    assert "last" not in json.dumps({key: value for key, value in found.items() if key != "recipe"})


def test_the_lineage_of_a_student_that_ended_before_its_run() -> None:
    """Its weights are those of an earlier step than the checkpoint's."""
    ended = {"step": 5, "reason": "no lower held-out loss in 2 evaluations"}
    found = lineage_of({**RUN, "student": "small"}, {**STATE, "ended": ended}, recipe_to_yaml(Recipe(global_batch=8)))
    assert (found["student"], found["steps"], found["samples"], found["ended"]) == ("small", 5, 40, ended["reason"])
    assert (
        not {"student", "ended"}
        & lineage_of({**RUN, "student": ""}, {**STATE, "ended": None}, recipe_to_yaml(Recipe())).keys()
    )


def test_the_built_student_knows_which_layer_null_means() -> None:
    teacher = tiny_encoder("bert")
    assert build_student(teacher, StudentConfig(**SHAPE), 0).matched == [(4, 2)]
    relations = RelationsConfig(layers=[LayerPair(2, 1), LayerPair(3, 2)])
    assert build_student(teacher, StudentConfig(**SHAPE), 0, relations).matched == [(2, 1), (3, 2)]


# -- lengths


def exported(teacher: Path, output: Path, of: Recipe, **facts) -> Path:
    model = load_encoder(teacher)
    about = {**lineage(of, matched_layers=[[4, 2]]), **facts}
    return export_student(Export(model.state_dict(), model.config, str(teacher), about), output)


def recipe_of(init: str, seq_len: int) -> Recipe:
    return Recipe(seq_len=seq_len, student=StudentConfig(init=init))  # type: ignore[arg-type]


@pytest.mark.parametrize(("init", "seq_len", "longest"), [("random", 32, 32), ("random", 64, 64), ("layers", 32, 128)])
def test_the_tokenizer_cuts_where_random_positions_begin(
    init: str, seq_len: int, longest: int, tiny_teacher: Path, tmp_path: Path
) -> None:
    """The tiny teacher has 64 positions and its tokenizer cuts at 128; both are kept if positions come from the teacher."""
    output = exported(tiny_teacher, tmp_path / "student", recipe_of(init, seq_len))
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.model_max_length == longest
    others = [json.loads((d / "tokenizer_config.json").read_text()) for d in (output, tiny_teacher)]
    assert {**others[0], "model_max_length": 0} == {**others[1], "model_max_length": 0}
    card = model_card(output).split("## Lineage")[0]
    assert ("cut inputs at 32 tokens" in card) == ((init, seq_len) == ("random", 32))
    assert ("those of the teacher" in card) == (init == "layers")


@pytest.mark.parametrize(
    ("before", "text", "trained"),
    [
        (None, "the position embeddings after 32 are those of the encoder that it began from", 64),
        (16, "from random weights on rows of 32 tokens and accepts 64, but positions after 32 were never trained", 32),
        (48, "from random weights on rows of 48 tokens and accepts 64, but positions after 48 were never trained", 48),
        (64, "the position embeddings after 32 are those of the encoder that it began from", 64),
    ],
)
def test_random_positions_of_the_encoder_that_a_student_began_from(
    before: int | None, text: str, trained: int, tiny_teacher: Path, tmp_path: Path
) -> None:
    """A second run on shorter or longer rows than the first, whose positions began at random."""
    first = exported(tiny_teacher, tmp_path / "first", recipe_of("random" if before else "layers", before or 32))
    recipe = recipe_of(str(first), 32)
    second = exported(tiny_teacher, tmp_path / "second", recipe, trained_length=trained_length(recipe))
    assert text in length_note(second)
    assert longest_input(second) == trained
    assert trained_length(recipe_of(str(second), 8)) == trained_length(recipe)


@pytest.mark.parametrize("content", [None, "{}", '{"model_max_length": null}', '{"model_max_length": 1e30}'])
def test_the_tokenizer_cuts_where_the_teachers_says_no_length(
    content: str | None, tiny_teacher: Path, tmp_path: Path
) -> None:
    """The card says that the tokenizer cuts; XLM-R's first release has no tokenizer_config.json."""
    teacher = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))
    (teacher / "tokenizer_config.json").unlink()
    if content is not None:
        (teacher / "tokenizer_config.json").write_text(content)
    output = exported(teacher, tmp_path / "student", recipe_of("random", 32))
    assert AutoTokenizer.from_pretrained(output).model_max_length == 32
    assert tokenizer_sha256(output) == tokenizer_sha256(teacher)


@pytest.mark.parametrize("length", ["512", 512.0, True, [512]])
def test_a_trained_length_that_is_no_number_of_tokens(length: object, tiny_teacher: Path, tmp_path: Path) -> None:
    """One message for the run that starts from the student and for its evaluation."""
    first = exported(tiny_teacher, tmp_path / "first", recipe_of("random", 32))
    lineage = json.loads((first / "lineage.json").read_text())
    (first / "lineage.json").write_text(json.dumps({**lineage, "trained_length": length}))
    for read in (lambda: trained_length(recipe_of(str(first), 32)), lambda: longest_input(first)):
        with pytest.raises(UserError, match=r"first/lineage\.json is corrupt .*the trained length is .*Export"):
            read()


def test_an_evaluation_of_longer_texts_warns(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = load_for_evaluation(str(exported(tiny_teacher, tmp_path / "student", recipe_of("random", 32))))
    capsys.readouterr()
    encoder.check_max_length(32, "retrieval.max_length")
    assert capsys.readouterr().err == ""
    encoder.check_max_length(60, "retrieval.max_length")
    assert "--set retrieval.max_length=32" in capsys.readouterr().err


# -- the card


@pytest.mark.parametrize(
    ("student_layer", "text"),
    [
        (4, "values of the last layer; that layer's output and feed-forward weights have"),
        ("last", "values of the last layer; that layer's output and feed-forward weights have"),
        (3, "values of layer 3 of 4; that layer's output and feed-forward weights, and all layers above it, have"),
        ([2, 4], "values of layer 2, 4 of 4; layer 4's output and feed-forward weights have"),
    ],
)
def test_the_card_names_what_was_not_trained(student_layer, text: str, tiny_teacher: Path, tmp_path: Path) -> None:
    output = exported(tiny_teacher, tmp_path / "student", Recipe(), student_layer=student_layer)
    assert text in " ".join(model_card(output).split())


def test_the_card_names_other_dropout(tiny_teacher: Path, tmp_path: Path) -> None:
    dropout = {"distillation": {"hidden_dropout_prob": 0.0}, "config": {"hidden_dropout_prob": 0.1}}
    output = exported(tiny_teacher, tmp_path / "student", Recipe(), dropout=dropout)
    assert "distilled with other dropout (hidden_dropout_prob 0.0)" in " ".join(model_card(output).split())


def test_recipes_of_old_lineages_are_read(tiny_teacher: Path, tmp_path: Path) -> None:
    """Missing keys are left out."""
    tree = {key: value for key, value in as_tree(Recipe()).items() if key in ("steps", "relations")}
    output = exported(tiny_teacher, tmp_path / "student", Recipe(), recipe=tree)
    assert "positions" not in model_card(output).split("## Lineage")[0]
