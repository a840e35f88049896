"""A student that starts from an encoder other than its teacher: `student.init: DIR`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import Recipe
from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.distiller import DistillModule
from pipeline.distillation.models.student import StudentConfig, build_student
from pipeline.distillation.models.teacher import load_teacher
from pipeline.errors import UserError
from pipeline.planning.meta_models import build_encoders
from tests.tiny_encoders import CONFIGS, random_rows, tiny_encoder

SHAPE = {"layers": 3, "hidden": 24, "heads": 3, "ffn": 60}


def narrow(model_type: str, seed: int = 5, **changes):
    """An encoder of `SHAPE` with its own dropout and norm constant."""
    keys = {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 60}
    if model_type == "distilbert":
        keys = {"n_layers": 3, "dim": 24, "n_heads": 3, "hidden_dim": 60}
    if model_type == "modernbert":
        keys["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    return tiny_encoder(model_type, seed, **{**keys, **changes})


def save(model, directory: Path) -> str:
    model.save_pretrained(directory)
    return str(directory)


def build(teacher, init: str, relations: RelationsConfig | None = None, **changes):
    return build_student(teacher, StudentConfig(**{**SHAPE, "init": init, **changes}), 0, relations)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_student_is_that_encoder(model_type: str, tmp_path: Path) -> None:
    start = narrow(model_type)
    student = build(tiny_encoder(model_type), save(start, tmp_path))
    assert student.start == f"the encoder {tmp_path}"
    assert student.basis_Dd is None
    own = student.model.state_dict()
    expected = start.state_dict()
    assert own.keys() <= expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in own)
    rows = random_rows(2, 12)
    with torch.no_grad():
        assert torch.equal(student.model.eval()(rows)[0], start(rows)[0])
    assert set(student.trained) | set(student.untrained) == set(own)


def test_all_other_settings_are_the_encoders(tmp_path: Path) -> None:
    start = narrow("xlm-roberta", layer_norm_eps=1e-3, hidden_act="relu", hidden_dropout_prob=0.25)
    init = save(start, tmp_path)
    student = build(tiny_encoder("xlm-roberta"), init)
    config = student.model.config
    assert (config.layer_norm_eps, config.hidden_act, config.hidden_dropout_prob) == (1e-3, "relu", 0.25)
    without = build(tiny_encoder("xlm-roberta"), init, dropout=0.0)
    assert without.model.config.hidden_dropout_prob == 0.0
    assert student.own_dropout == without.own_dropout
    assert without.own_dropout["hidden_dropout_prob"] == 0.25


def test_weights_in_half_precision_are_trained_in_fp32(tmp_path: Path) -> None:
    start = narrow("bert")
    student = build(tiny_encoder("bert"), save(start.half(), tmp_path))
    assert student.model.config.dtype == torch.float32
    for name, tensor in student.model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, start.state_dict()[name].float())


def test_its_embeddings_can_be_frozen(tmp_path: Path) -> None:
    start = narrow("xlm-roberta")
    student = build(tiny_encoder("xlm-roberta"), save(start, tmp_path), freeze=["embeddings"])
    frozen = "embeddings.word_embeddings.weight"
    assert frozen not in student.trained
    assert torch.equal(student.untrained[frozen], start.state_dict()[frozen])


def test_an_encoder_of_another_architecture_than_the_teacher(tmp_path: Path) -> None:
    """XLM-R counts positions from the padding id on: 80 of them are 78 of BERT."""
    teacher, init = tiny_encoder("xlm-roberta"), save(narrow("bert", max_position_embeddings=78), tmp_path)
    assert build(teacher, init, family="bert").model.config.model_type == "bert"
    with pytest.raises(
        UserError, match=r"model type bert, not xlm-roberta \(`student.family`\).*--set student.family=bert$"
    ):
        build(teacher, init)


@pytest.mark.parametrize(
    ("of_encoder", "of_recipe", "words"),
    [
        ({}, {"layers": 2}, r"layers 3, not 2 \(`student.layers`\)\. For .*: --set student.layers=3$"),
        (
            {},
            {"hidden": 48, "heads": 4, "ffn": None},
            r"width 24, not 48 .*; attention heads 3, not 4 .*; FFN width 60, not 192 \(`student.ffn`\)\. For .*: "
            "--set student.hidden=24 --set student.heads=3 --set student.ffn=60$",
        ),
        (
            {"vocab_size": 130},
            {},
            r"rows of the word embedding 130, not 120 .*\. Start from an encoder with the vocabulary",
        ),
        ({"max_position_embeddings": 66}, {}, "tokens in the longest row 64, not 78 .* Start from an encoder"),
    ],
)
def test_another_shape_is_named_with_its_fix(of_encoder: dict, of_recipe: dict, words: str, tmp_path: Path) -> None:
    init = save(narrow("xlm-roberta", **of_encoder), tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        build(tiny_encoder("xlm-roberta"), init, **of_recipe)
    assert str(caught.value).startswith(f"the encoder of `student.init` '{init}' is not of the student's shape: ")
    assert "\n" not in str(caught.value)


def test_the_printed_settings_give_the_encoders_shape(tmp_path: Path) -> None:
    """Also where the FFN width, which by default follows the width, differs only after the width is set."""
    init = save(narrow("xlm-roberta"), tmp_path)
    for before in ({}, {"hidden": 15, "heads": 5}):  # 4 x 15 is the encoder's FFN width
        with pytest.raises(UserError) as caught:
            build_student(tiny_encoder("xlm-roberta"), StudentConfig(**before, init=init), 0)
        settings = dict(word.split("=") for word in str(caught.value).split() if word.startswith("student."))
        shape = {key.removeprefix("student."): int(value) for key, value in settings.items()}
        assert shape == SHAPE
        build_student(tiny_encoder("xlm-roberta"), StudentConfig(**shape, init=init), 0)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    init = save(narrow("bert"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"the encoder of `student.init` .* NaN or infinity in `encoder.layer.1.output"):
        build(tiny_encoder("bert"), init)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    init = save(narrow("bert"), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"encoder of `student.init` .*holds no model.safetensors.*safetensors only"):
        build(tiny_encoder("bert"), init)


def test_code_of_its_own_is_not_run(tmp_path: Path) -> None:
    init = save(narrow("bert"), tmp_path)
    config = tmp_path / "config.json"
    about = {**json.loads(config.read_text()), "auto_map": {"AutoModel": "modeling.Own"}}
    config.write_text(json.dumps(about))
    with pytest.raises(UserError, match="`auto_map` requires the model's own code"):
        build(tiny_encoder("bert"), init)


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ("layrs", "'layrs'; it must be one of random, layers, project, or .*Did you mean `layers`"),
        ("Project", "Did you mean `project`"),
        ("", "`student.init` is ''"),
        ("~no-such-user", "no-such-user"),
        ("x" * 5000, r"\.\.\."),
    ],
)
def test_a_word_that_is_neither_start_nor_directory(init: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        StudentConfig(init=init)
    assert len(str(caught.value)) < 600


def test_which_values_name_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "earlier").mkdir()
    (tmp_path / "layers").mkdir()
    monkeypatch.chdir(tmp_path)
    assert StudentConfig(init="layers").start_encoder is None
    assert StudentConfig(init="./layers").start_encoder == "./layers"
    assert StudentConfig(init="OWNER/NAME").start_encoder == "OWNER/NAME"
    named = StudentConfig(init="earlier")
    assert named.init == named.start_encoder == "./earlier"
    shutil.rmtree("earlier")
    assert StudentConfig(init=named.init) == named, "a run's recipe.yaml is also read where the encoder is not"


def test_layers_of_the_teacher_have_no_place_in_it() -> None:
    with pytest.raises(UserError, match=r"`student.init_layers` names layers of the teacher.*null"):
        StudentConfig(init="a/b", layers=2, init_layers=[1, 2])


def test_a_directory_that_does_not_exist() -> None:
    with pytest.raises(UserError, match=r"encoder of `student.init` not found: ./nowhere .*pipeline export"):
        build(tiny_encoder("bert"), "./nowhere")


def test_it_has_no_basis_for_a_squared_distance(tmp_path: Path) -> None:
    """`relations.tail: mse` compares outputs of equal widths, or on the basis of a student whose layers were projected."""
    relations = RelationsConfig(heads=12, tail="mse")
    teacher = tiny_encoder("bert")
    student = build(teacher, save(narrow("bert"), tmp_path), relations)
    tapped = load_teacher(teacher, **relations.tap_options)
    distiller = DistillModule(tapped, student.tapped, relations, student.basis_Dd)
    with pytest.raises(UserError, match=r"`relations.tail: mse` needs equal widths, not 48 .* and 24"):
        distiller(random_rows(2, 12))


def test_a_plan_needs_no_weights(tmp_path: Path) -> None:
    """Its figures are those of the student that the recipe describes, also where the encoder is not on this machine."""
    narrow("xlm-roberta").config.save_pretrained(tmp_path / "start")
    tiny_encoder("xlm-roberta").config.save_pretrained(tmp_path / "teacher")
    sizes = [
        build_encoders(
            Recipe(
                teacher=str(tmp_path / "teacher"),
                seq_len=16,
                relations=RelationsConfig(heads=12),
                student=StudentConfig(**SHAPE, init=init, freeze=freeze),
            )
        ).sizes
        for init, freeze in [
            ("random", []),
            (str(tmp_path / "start"), []),
            ("OWNER/NAME", []),
            (str(tmp_path / "start"), ["embeddings"]),
        ]
    ]
    assert sizes[0] == sizes[1] == sizes[2]
    assert sizes[3].untrained == sizes[0].untrained + 120 * 24
