"""`student.init: project`: a narrower student whose weights are the teacher's on principal components.

In: a complete fp32 teacher, a blank student of the same architecture, a `Calibration`. Out: the student's weights, set in
place, and the basis P [D, d] on which its hidden states are expressed. Derivation: docs/method.md.

Shape suffixes: B rows, L positions, N tokens, D channels of the teacher, d of the student, F neurons of the teacher's
FFN, f of them that the student keeps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from pipeline.distillation.models.architectures import ArchitectureSpec, architecture_of
from pipeline.distillation.models.student_init import embedding_width, principal_components, project_embeddings

TEACHER_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Calibration:
    """Text on which the teacher's states are measured, and the number of relation heads of the run."""

    rows_BL: torch.Tensor  # token ids, int64, no padding; on the device that computes
    relation_heads: int


@dataclass
class States:
    """Statistics of the teacher on the calibration rows, by module name in the student."""

    normed: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))  # a norm's output, [N, D]
    grams: dict[str, torch.Tensor | float] = field(default_factory=lambda: defaultdict(float))  # Y^T Y of a projection
    energies: dict[str, torch.Tensor | float] = field(default_factory=lambda: defaultdict(float))  # x^2 of FFN neurons

    def keep_normed(self, name: str, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.normed[name].append(output.flatten(0, -2))

    def keep_gram(self, name: str, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        y_ND = output.flatten(0, -2)
        self.grams[name] += y_ND.T @ y_ND

    def keep_energy(self, name: str, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.energies[name] += inputs[0].flatten(0, -2).square().sum(0)


def can_project_layers(teacher: PreTrainedModel, architecture: ArchitectureSpec) -> bool:
    """Whether layers can be projected: separate Q, K, V, an FFN of two products, and embeddings as wide as the layers
    (ELECTRA may factorise its embedding)."""
    return architecture.products is not None and embedding_width(teacher) == teacher.config.hidden_size


@torch.no_grad()
def project_layers(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    chosen: list[int],
    tapped: set[int],
    calibration: Calibration,
) -> torch.Tensor:
    """Set the student's weights from the teacher's and return P [D, d], fp32, on the CPU.

    `chosen` names the teacher layer of each student layer, `tapped` the student layers whose relations are matched, both
    counted from 1.
    """
    device, was_training = calibration.rows_BL.device, student.training
    for model in (teacher, student):
        nn.Module.to(model, device)
    student.eval()
    architecture = architecture_of(teacher.config)
    states = _observe(teacher, architecture, chosen, calibration.rows_BL)
    normed = {name: torch.cat(states.normed.pop(name)) for name in list(states.normed)}
    gram_DD = torch.stack([(x_ND.T @ x_ND).double() / x_ND.double().square().sum() for x_ND in normed.values()]).sum(0)
    basis_Dd = principal_components(gram_DD, student.config.hidden_size).float()
    project_embeddings(teacher, student, basis_Dd)
    for number, source in enumerate(chosen, start=1):
        names = (f"{architecture.layers}.{number - 1}", f"{architecture.layers}.{source - 1}")
        if number in tapped:
            channels = torch.arange(teacher.config.hidden_size, device=device)
            groups = list(channels.chunk(calibration.relation_heads))
        else:
            groups = _attention_groups(teacher, student, states, names, basis_Dd.shape[1])
        _project_layer(teacher, student, states, names, groups, basis_Dd)
    _fit_norms(student, {name: x_ND @ basis_Dd for name, x_ND in normed.items()}, calibration.rows_BL)
    teacher.cpu()
    student.cpu().train(was_training)
    return basis_Dd.cpu().contiguous()


def _observe(
    teacher: PreTrainedModel, architecture: ArchitectureSpec, chosen: list[int], rows_BL: torch.Tensor
) -> States:
    """Run the teacher once over the rows, a few at a time, and collect its statistics with hooks."""
    states = States()
    with ExitStack() as stack:

        def watch(module: nn.Module, keep) -> None:
            stack.callback(module.register_forward_hook(keep).remove)

        for name, module in teacher.named_modules():
            if isinstance(module, nn.LayerNorm) and not name.startswith(architecture.layers + "."):
                watch(module, partial(states.keep_normed, name))
        for number, source in enumerate(chosen):
            own, layer = (
                f"{architecture.layers}.{number}.",
                teacher.get_submodule(f"{architecture.layers}.{source - 1}"),
            )
            for name, module in layer.named_modules():
                if isinstance(module, nn.LayerNorm):
                    watch(module, partial(states.keep_normed, own + name))
                elif name in architecture.projections:
                    watch(module, partial(states.keep_gram, own + name))
                elif name == cast(tuple, architecture.products)[2]:
                    watch(module, partial(states.keep_energy, own + name))
        for part_BL in rows_BL.split(max(1, TEACHER_TOKENS_AT_ONCE // rows_BL.shape[1])):
            teacher(input_ids=part_BL)
    return states


def _project_layer(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    states: States,
    names: tuple[str, str],
    groups: list[torch.Tensor],
    basis_Dd: torch.Tensor,
) -> None:
    """Set the products of one student layer: W' = (output components)^T W (input components).

    `names` are those of the student's layer and of the teacher's. Each of `groups` lists channels of Q, K and V of the
    teacher that share an equal part of the student's channels.
    """
    architecture = architecture_of(teacher.config)
    own, theirs = (dict(m.get_submodule(n).named_modules()) for m, n in zip((student, teacher), names, strict=True))
    attention_out, ffn_in, ffn_out = cast(tuple[str, str, str], architecture.products)
    query, key, value = architecture.projections
    gram_DD = {name: cast(torch.Tensor, states.grams[f"{names[0]}.{name}"]) for name in architecture.projections}
    alike_DD = gram_DD[query] / gram_DD[query].trace() + gram_DD[key] / gram_DD[key].trace()
    reduce_qk_Dd, reduce_v_Dd = (_reduction(gram, groups, basis_Dd.shape[1]) for gram in (alike_DD, gram_DD[value]))
    # A softmax over 1 / sqrt(width) times a product: with w of W channels in a head, Q and K shrink by (w / W)^(1/4).
    shrink = (basis_Dd.shape[1] / sum(map(len, groups))) ** 0.25
    for name, reduce_Dd in ((query, reduce_qk_Dd), (key, reduce_qk_Dd), (value, reduce_v_Dd)):
        _set(own[name], theirs[name], basis_Dd, shrink * reduce_Dd)
    _set(own[attention_out], theirs[attention_out], reduce_v_Dd / shrink, basis_Dd)

    worth_F = states.energies[f"{names[0]}.{ffn_out}"] * cast(nn.Linear, theirs[ffn_out]).weight.square().sum(0)
    kept_f = worth_F.topk(min(cast(nn.Linear, own[ffn_out]).in_features, len(worth_F))).indices.sort().values
    pick_Ff = functional.one_hot(kept_f, len(worth_F)).T.to(basis_Dd)
    _set(own[ffn_in], theirs[ffn_in], basis_Dd, pick_Ff)
    _set(own[ffn_out], theirs[ffn_out], pick_Ff, basis_Dd)


def _attention_groups(
    teacher: PreTrainedModel, student: PreTrainedModel, states: States, names: tuple[str, str], narrow: int
) -> list[torch.Tensor]:
    """Channels of the teacher's attention heads for each student head: of the heads that add most to the hidden state.

    If the student has more or wider heads than the teacher, its heads share the channels of groups of teacher heads.
    """
    architecture = architecture_of(teacher.config)
    num_theirs, num_own = teacher.config.num_attention_heads, student.config.num_attention_heads
    gram_DD = cast(torch.Tensor, states.grams[f"{names[0]}.{architecture.projections[2]}"])
    attention_out = f"{names[1]}.{cast(tuple, architecture.products)[0]}"
    out_DD = cast(nn.Linear, teacher.get_submodule(attention_out)).weight
    channels = torch.arange(len(gram_DD), device=gram_DD.device)
    of_heads = channels.chunk(num_theirs)
    if num_own > num_theirs or narrow // num_own > len(of_heads[0]):
        return list(channels.chunk(math.gcd(num_theirs, num_own)))
    worth = torch.stack([((out_DD[:, c] @ gram_DD[c][:, c]) * out_DD[:, c]).sum() for c in of_heads])
    return [of_heads[head] for head in worth.topk(num_own).indices.sort().values.tolist()]


def _reduction(gram_DD: torch.Tensor, groups: list[torch.Tensor], narrow: int) -> torch.Tensor:
    """S [D, d]: the same number of principal components of each group of channels."""
    reduce_Dd = gram_DD.new_zeros(len(gram_DD), narrow)
    width = narrow // len(groups)
    for place, channels in enumerate(groups):
        within = principal_components(gram_DD[channels][:, channels].double(), width)
        reduce_Dd[channels, place * width : (place + 1) * width] = within.to(reduce_Dd)
    return reduce_Dd


def _set(own: nn.Module, theirs: nn.Module, inputs_Dd: torch.Tensor, outputs_Dd: torch.Tensor) -> None:
    """Set W' = outputs^T W inputs and b' = outputs^T b. Further neurons of the student keep their random start."""
    weight, bias = cast(nn.Linear, theirs).weight, cast(nn.Linear, theirs).bias
    new = outputs_Dd.T @ weight @ inputs_Dd
    cast(nn.Linear, own).weight[: new.shape[0], : new.shape[1]] = new
    cast(nn.Linear, own).bias[: new.shape[0]] = outputs_Dd.T @ bias


def _fit_norms(student: PreTrainedModel, targets: dict[str, torch.Tensor], rows_BL: torch.Tensor) -> None:
    """Fit weight and bias of each norm to its target [N, d], channel by channel, by least squares.

    A norm cannot be expressed in another basis. Norms are fitted in the order in which the student's forward runs them.
    """

    def fit(target_Nd: torch.Tensor, norm: nn.LayerNorm, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        plain_Nd = functional.layer_norm(inputs[0].flatten(0, -2), norm.normalized_shape, eps=norm.eps)
        centred_Nd, mean_d = plain_Nd - plain_Nd.mean(0), target_Nd.mean(0)
        variance_d = centred_Nd.square().mean(0).clamp_min(torch.finfo(torch.float32).tiny)
        norm.weight.copy_((centred_Nd * (target_Nd - mean_d)).mean(0) / variance_d)
        norm.bias.copy_(mean_d - norm.weight * plain_Nd.mean(0))
        return (plain_Nd * norm.weight + norm.bias).view_as(output)

    with ExitStack() as stack:
        for name, target_Nd in targets.items():
            stack.callback(student.get_submodule(name).register_forward_hook(partial(fit, target_Nd)).remove)
        student(input_ids=rows_BL)
