"""First weights of a student: copies of teacher layers, the teacher's embeddings on their principal components, or all
weights of another encoder.

In: the complete teacher and a blank student. Out: the student's weights, set in place. Weights that are not set keep the
architecture's random start. projection.py projects complete layers.

Shape suffixes: D channels of the teacher, d of the student, N tokens, n components.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.distillation.models.architectures import ArchitectureSpec, architecture_of, usable_positions
from pipeline.errors import UserError

START_ENCODER = "encoder of `student.init`"  # what messages call it
GRAM_BLOCK_ROWS = 8192  # in float64 at a time: all 250 002 rows of XLM-R-large, twice, would be 4 GB


def copied_layers(num_teacher_layers: int, num_layers: int, named: list[int] | None, teacher_layer: int) -> list[int]:
    """The teacher layer of each student layer, from 1: `named` (`student.init_layers`), checked, or evenly spaced ones up
    to `teacher_layer`, the highest distilled layer."""
    spaced = [max(1, round((i + 1) * teacher_layer / num_layers)) for i in range(num_layers)]
    if named is None:
        return spaced
    if len(named) != num_layers:
        raise UserError(
            f"`student.init_layers` names {len(named)} layers for {num_layers} student layers. Name {num_layers}, or let "
            f"them be spaced evenly ({', '.join(map(str, spaced))}): --set student.init_layers=null"
        )
    for layer in named:
        if not 1 <= layer <= num_teacher_layers:
            raise UserError(
                f"`student.init_layers` names layer {layer}; the teacher has layers 1 to {num_teacher_layers}"
            )
    return named


def copy_layers(
    teacher: PreTrainedModel, student: PreTrainedModel, architecture: ArchitectureSpec, chosen: list[int]
) -> None:
    """Copy everything outside the layer list, and the chosen layers in order, from teacher to student."""
    prefix = architecture.layers + "."
    source = {name: tensor for name, tensor in teacher.state_dict().items() if not name.startswith(prefix)}
    for name, tensor in teacher.state_dict().items():
        if name.startswith(prefix):
            number, _, rest = name[len(prefix) :].partition(".")
            for position in (i for i, layer in enumerate(chosen) if layer == int(number) + 1):
                source[f"{prefix}{position}.{rest}"] = tensor
    own = student.state_dict()
    for name, tensor in own.items():
        # ModernBERT's first layer has no norm before attention. Copied to a higher layer, it leaves that norm at ones.
        copied = source.setdefault(name, tensor)
        if copied.shape != tensor.shape:
            raise UserError(
                f"`student.init: layers` copies the teacher's weights, but `{name}` is {tuple(copied.shape)} in the "
                f"teacher and {tuple(tensor.shape)} in the student; use the teacher's hidden and ffn, or another init"
            )
    student.load_state_dict({name: source[name] for name in own})


def check_start_shape(name: str, given: PretrainedConfig, expected: PretrainedConfig) -> None:
    """Raise a `UserError` unless an encoder has the shape of the recipe's student, and the vocabulary and positions of its
    teacher.

    Args:
        name: of the encoder, for the message
        given: the encoder's config
        expected: the config of a student of the recipe that starts from its teacher
    """
    has, needs = _shape(given), _shape(expected)
    differing = [key for key in has if has[key] != needs[key]]
    if not differing:
        return
    what = "; ".join(f"{SHAPE[key]} {has[key]}, not {needs[key]} ({_decided_by(key)})" for key in differing)
    too = {"student.ffn"} if "student.hidden" in differing else set()  # its default follows the width
    settings = " ".join(f"--set {key}={has[key]}" for key in has if key in OF_RECIPE & {*differing, *too})
    fixes = [f"For a student of this shape: {settings}"] if settings else []
    if not OF_RECIPE.issuperset(differing):
        fixes.append(
            "Start from an encoder with the vocabulary and positions of the teacher, or use another `student.init`"
        )
    raise UserError(f"the {START_ENCODER} {name!r} is not of the student's shape: {what}. {'. '.join(fixes)}")


SHAPE = {  # what a message calls an entry of `_shape`
    "student.family": "model type",
    "student.layers": "layers",
    "student.hidden": "width",
    "student.heads": "attention heads",
    "student.ffn": "FFN width",
    "vocab_size": "rows of the word embedding",
    "positions": "tokens in the longest row",
}
OF_RECIPE = frozenset(key for key in SHAPE if key.startswith("student."))


def _decided_by(key: str) -> str:
    return f"`{key}`" if key in OF_RECIPE else "as the teacher with the recipe's tokenizer"


def _shape(config: PretrainedConfig) -> dict[str, int | str]:
    return {
        "student.family": config.model_type,
        "student.layers": config.num_hidden_layers,
        "student.hidden": config.hidden_size,
        "student.heads": config.num_attention_heads,
        "student.ffn": getattr(config, architecture_of(config).ffn_key),
        "vocab_size": config.vocab_size,
        "positions": usable_positions(config),
    }


def check_width(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Raise a `UserError` if the student is wider than the teacher: there are no more components than channels."""
    width, narrow = embedding_width(teacher), embedding_width(student)
    if narrow > width:
        raise UserError(
            f"`student.init: project` keeps principal components of the teacher's hidden states, of which there are "
            f"{width}; the student is {narrow} wide. Use a narrower student or `student.init: random`"
        )


@torch.no_grad()
def project_embeddings(
    teacher: PreTrainedModel, student: PreTrainedModel, basis_Dd: torch.Tensor | None = None
) -> None:
    """Set the student's word, position and token-type embeddings to the teacher's times `basis_Dd`.

    By default the basis is the principal components of the word embeddings. They are not centred, because the norm after
    the embeddings expects the mean vector.
    """
    width = embedding_width(teacher)
    if basis_Dd is None:
        words_VD = _embedding(teacher).weight
        gram_DD = torch.zeros(width, width, dtype=torch.float64, device=words_VD.device)
        for block_ND in words_VD.split(GRAM_BLOCK_ROWS):
            gram_DD += block_ND.T.double() @ block_ND.double()
        basis_Dd = principal_components(gram_DD, embedding_width(student))
    own = dict(student.named_modules())
    for name, module in teacher.named_modules():
        target = own.get(name)
        if isinstance(module, nn.Embedding) and isinstance(target, nn.Embedding) and module.embedding_dim == width:
            target.weight.copy_(module.weight @ basis_Dd.to(module.weight))


def principal_components(gram_DD: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` eigenvectors of X^T X (float64), [D, count], largest eigenvalue first. The entry of largest
    magnitude of each is positive, so that every machine finds the same signs."""
    _, vectors_DD = torch.linalg.eigh(gram_DD)  # eigenvalues come in ascending order
    first_Dn = vectors_DD[:, len(gram_DD) - count :].flip(1)
    largest_1n = first_Dn.abs().argmax(0, keepdim=True)
    return first_Dn * first_Dn.gather(0, largest_1n).sign()


def embedding_width(model: PreTrainedModel) -> int:
    """Channels of the word embedding; in ELECTRA there may be fewer than in the hidden states."""
    return _embedding(model).weight.shape[1]


def _embedding(model: PreTrainedModel) -> nn.Embedding:
    return cast(nn.Embedding, model.get_input_embeddings())
