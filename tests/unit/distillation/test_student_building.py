"""The student's shape, its first weights, and the split into trained and untrained weights."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoModel

from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.models import student_init
from pipeline.distillation.models.architectures import ARCHITECTURES
from pipeline.distillation.models.student import StudentConfig, build_student
from pipeline.errors import UserError
from tests.tiny_encoders import CONFIGS, random_rows, tiny_encoder

SAME = {"hidden": 48, "heads": 4, "ffn": 96}
TAIL = ("attention.output", "intermediate", "output", "attn.Wo", "mlp", "ffn", "out_lin", "sa_layer_norm", "attn.o.")


def build(teacher, seed=0, **changes):
    options = {"layers": 2, **SAME, **changes}
    return build_student(teacher, StudentConfig(**options), seed)


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("init", ["random", "layers"])
def test_trained_and_untrained_weights_are_the_complete_model(model_type, init):
    student = build(tiny_encoder(model_type), init=init)
    names = set(student.model.state_dict())
    assert set(student.trained) | set(student.untrained) == names
    assert not set(student.trained) & set(student.untrained)
    query, key, value = student.tapped(random_rows(2, 12))
    (query.square().sum() + key.square().sum() + value.square().sum()).backward()
    with_gradient = {name for name, parameter in student.model.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(student.trained)
    last = [name for name in student.untrained if any(part in name for part in TAIL)]
    assert last, "the last layer's attention output and FFN are untrained"


@pytest.mark.parametrize("model_type", CONFIGS)
def test_copied_layers_and_a_round_trip(model_type, tmp_path):
    """A student with all the teacher's layers computes what the teacher does, also after saving and loading."""
    teacher, rows = tiny_encoder(model_type), random_rows(2, 12)
    student = build(teacher, layers=4, init="layers")
    student.model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = teacher(rows)[0]
        assert torch.equal(student.model.eval()(rows)[0], expected)
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(rows)[0], expected)


@pytest.mark.parametrize(
    ("named", "teacher_layer", "expected"), [(None, None, [2, 4]), (None, 3, [2, 3]), ([1, 4], None, [1, 4])]
)
def test_which_layers_are_copied(named, teacher_layer, expected):
    teacher = tiny_encoder("bert")
    config = StudentConfig(layers=2, **SAME, init="layers", init_layers=named)
    student = build_student(teacher, config, 0, RelationsConfig(teacher_layer=teacher_layer))
    for mine, theirs in zip(student.model.encoder.layer, expected, strict=True):
        assert torch.equal(mine.output.dense.weight, teacher.encoder.layer[theirs - 1].output.dense.weight)


def test_frozen_embeddings_are_untrained():
    student = build(tiny_encoder("xlm-roberta"), init="layers", freeze=["embeddings"])
    frozen = "embeddings.word_embeddings.weight"
    assert frozen in student.untrained
    assert "embeddings.position_embeddings.weight" in student.trained
    student.tapped(random_rows(2, 12))[0].sum().backward()
    assert student.model.get_input_embeddings().weight.grad is None


def test_untrained_weights_are_copies_in_fp32():
    student = build(tiny_encoder("bert"), init="layers")
    name = next(iter(student.untrained))
    before = student.untrained[name].clone()
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.zero_()
    student.model.bfloat16()
    assert student.untrained[name].dtype == torch.float32
    assert torch.equal(student.untrained[name], before)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_shape_is_the_configs_and_the_rest_is_the_teachers(model_type):
    teacher = tiny_encoder(model_type)
    student = build(teacher, layers=3, hidden=24, heads=3, ffn=None, dropout=0.0)
    config = student.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 24, 3)
    ffn_inputs = {p.shape[1] for n, p in student.model.named_parameters() if p.ndim == 2 and p.shape[0] == 24}
    assert 96 in ffn_inputs
    for key in ("vocab_size", "max_position_embeddings", "pad_token_id"):
        assert getattr(config, key) == getattr(teacher.config, key)
    student.model.train()
    rows = random_rows(2, 12)
    assert torch.equal(student.tapped(rows)[0], student.tapped(rows)[0]), "dropout 0 means none"
    assert teacher.config.hidden_size == 48, "the teacher's own config is left alone"


def test_the_seed_decides_and_the_process_state_is_left_alone():
    teacher = tiny_encoder("bert")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second, other = build(teacher, 1), build(teacher, 1), build(teacher, 2)
    assert torch.equal(torch.rand(3), expected)
    weights = [student.model.encoder.layer[0].output.dense.weight for student in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_node_with_several_gpus_is_not_touched(monkeypatch):
    """`torch.random.fork_rng()` copies the generator of every GPU, and warns; `torch.manual_seed` would seed them."""
    teacher, seeded = tiny_encoder("xlm-roberta"), []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(teacher, init="random")
    assert not seeded


def test_projection_preserves_similarities_of_embeddings():
    """With all components every inner product is preserved; with half of them, the best rank-24 approximation."""
    teacher = tiny_encoder("xlm-roberta")
    words = teacher.get_input_embeddings().weight.detach()
    words_of_student = build(teacher, init="project").model.get_input_embeddings().weight.detach()
    assert torch.allclose(words_of_student @ words_of_student.T, words @ words.T, atol=1e-3)
    half = build(teacher, init="project", hidden=24, heads=4).model.get_input_embeddings().weight.detach()
    singular = torch.linalg.svdvals(words)
    lost = (words @ words.T - half @ half.T).norm()
    assert torch.allclose(lost, singular[24:].pow(4).sum().sqrt(), rtol=1e-3)


def test_projection_reads_the_embeddings_in_blocks(monkeypatch):
    """The result does not depend on the size of a block, nor on a last block that is not full."""
    weights = []
    for rows in (1000, 7):
        monkeypatch.setattr(student_init, "GRAM_BLOCK_ROWS", rows)
        student = build(tiny_encoder("xlm-roberta"), init="project", hidden=24, heads=4)
        weights.append(student.model.get_input_embeddings().weight.detach())
    assert torch.allclose(*weights, atol=1e-5)


def test_a_student_of_another_architecture():
    teacher = tiny_encoder("xlm-roberta")
    student = build(teacher, family="bert", hidden=24, ffn=None)
    assert student.model.config.model_type == "bert"
    assert student.model.config.max_position_embeddings == 78  # XLM-R counts positions from the padding id on
    assert student.model.get_input_embeddings().num_embeddings == 120
    back = build(student.model, family="xlm-roberta", hidden=24, ffn=None)
    assert back.model.config.max_position_embeddings == 80


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("model_type", [name for name in CONFIGS if name != "mpnet"])
def test_recomputed_activations_change_nothing(model_type, dropout):
    """Dropout included: the recomputation drops the same channels."""
    teacher, rows = tiny_encoder(model_type), random_rows(2, 12)
    gradients, calls = [], []
    for checkpointing in (False, True):
        student = build(teacher, init="layers", checkpointing=checkpointing, dropout=dropout)
        first = student.model.train().get_submodule(ARCHITECTURES[model_type].layers + ".0")
        products = [module for module in first.modules() if isinstance(module, torch.nn.Linear)]
        products[0].register_forward_hook(lambda *_, number=int(checkpointing): calls.append(number))
        torch.manual_seed(7)
        sum(x_BLD.square().sum() for x_BLD in student.tapped(rows)).backward()
        gradients.append([parameter.grad for parameter in student.trained.values()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert calls.count(1) == 2 * calls.count(0) > 0, "the layer ran a second time, in backward"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, "5 attention heads do not divide .* 48.*1, 2, 3, 4, 6"),
        ({"layers": 0}, "student.layers"),
        ({"freeze": ["embedding"], "init": "layers"}, "'embedding'.*embeddings"),
        ({"freeze": ["embeddings"]}, "leave the embeddings random"),
        ({"init": "layers", "init_layers": [1, 9]}, "layer 9.*1 to 4"),
        ({"init": "layers", "init_layers": [1]}, "1 layers for 2"),
        ({"init": "layers", "hidden": 24}, "`embeddings.word_embeddings.weight`"),
        ({"init": "project", "hidden": 96}, "48; the student is 96 wide"),
        ({"family": "gpt2"}, "'gpt2'.*xlm-roberta"),
        ({"family": "roberta", "init": "layers"}, "init: random"),
    ],
)
def test_a_student_that_cannot_be_built_is_explained(changes, words):
    with pytest.raises(UserError, match=f"(?s){words}"):
        build(tiny_encoder("bert"), **changes)


def test_an_architecture_that_cannot_recompute_says_so():
    with pytest.raises(UserError, match="mpnet cannot recompute"):
        build(tiny_encoder("mpnet"), checkpointing=True)


def test_a_teacher_already_in_half_precision_is_a_programming_error():
    with pytest.raises(ValueError, match="fp32"):
        build(tiny_encoder("bert").bfloat16())
