"""Compiled layers: the losses and gradients of layers as written, a known number of graphs, and loud recompiles."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from pipeline.distillation.compiled_layers import check_compiler, compile_layers, is_compiled, uncompiled
from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.distiller import DistillModule
from pipeline.distillation.models.student import Student, StudentConfig, build_student
from pipeline.distillation.models.teacher import load_teacher
from pipeline.distillation.tap import tap
from pipeline.errors import EXIT_USER, UserError
from pipeline.runtime.determinism import deterministic_kernels
from tests.conftest import REPO
from tests.tiny_encoders import CONFIGS, padded_rows, random_rows, tiny_encoder

NUM_GRAPHS = {"modernbert": 2}  # its first layer has no norm before attention; the next two have a window
SEGMENTS = torch.tensor([[20, 0], [12, 8], [5, 4]])
LOGGER = "pipeline.distillation.compiled_layers"


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOGGER and record.levelname == "ERROR"]


def make(model_type: str, compiled: bool, **changes) -> tuple[DistillModule, Student]:
    """Teacher and student of that architecture, always with the same weights; the student trains without dropout."""
    relations = RelationsConfig(heads=12)
    model = tiny_encoder(model_type)
    config = StudentConfig(**{"layers": 4, "hidden": 24, "heads": 2, "dropout": 0.0, **changes})
    student = build_student(model, config, 3, relations)
    teacher = load_teacher(model)
    if compiled:
        compile_layers(teacher.tapped, "teacher_options.compile")
        compile_layers(student.tapped, "student.compile")
    return DistillModule(teacher, student.tapped, relations).train(), student


def train_step(module: DistillModule, rows: torch.Tensor, **mask) -> tuple[float, dict[str, torch.Tensor]]:
    module.zero_grad()
    loss, _ = module(rows, **mask)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def assert_same_step(model_type: str, mask: dict, **changes) -> int:
    """One training step, compiled and as written; the number of graphs that it took."""
    rows = padded_rows([20, 20, 9])[0]
    (written, _), (compiled, _) = (make(model_type, compiled=c, **changes) for c in (False, True))
    loss, gradients = train_step(written, rows, **mask)
    before = num_graphs()
    assert train_step(compiled, rows, **mask)[0] == pytest.approx(loss, rel=1e-5)
    found = num_graphs() - before
    _, again = train_step(compiled, rows, **mask)
    assert num_graphs() - before == found, "the second batch was compiled again"
    assert again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (again[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
    return found


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_architecture_compiles_into_few_graphs(model_type: str) -> None:
    """Traced and differentiated as for inductor, without its code generation. Teacher and student have graphs of their own."""
    with torch.compiler.set_stance(force_backend="aot_eager"):
        assert assert_same_step(model_type, {}) == 2 * NUM_GRAPHS.get(model_type, 1)


@pytest.mark.parametrize(
    ("model_type", "mask", "changes"),
    [
        ("xlm-roberta", {}, {"checkpointing": True}),
        ("modernbert", {"lengths_B": torch.tensor([20, 20, 9])}, {}),
        ("bert", {"segments": SEGMENTS}, {}),
        ("modernbert", {"segments": SEGMENTS}, {}),
    ],
)
def test_generated_code_gives_the_same_losses_and_gradients(model_type: str, mask: dict, changes: dict) -> None:
    with deterministic_kernels(True):
        assert_same_step(model_type, mask, **changes)


def test_recomputed_activations_have_the_forwards_dropout_masks() -> None:
    """The gradient is that of the loss with this seed's masks: the loss changes along it as the gradient says."""
    module, _ = make("xlm-roberta", compiled=True, layers=3, dropout=0.3, checkpointing=True)
    rows, step = random_rows(3, 20), 1e-2

    def loss_at(distance: float) -> float:
        """With the weights moved along the gradient; the same masks each time."""
        torch.manual_seed(5)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.add_(gradients.get(name, torch.zeros_like(parameter)), alpha=distance)
        return module(rows)[0].item()

    torch.manual_seed(5)
    _, gradients = train_step(module, rows)
    length = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    gradients = {name: gradient / length for name, gradient in gradients.items()}
    ahead, behind = loss_at(step), loss_at(-2 * step)
    assert (ahead - behind) / (2 * step) == pytest.approx(length, rel=0.02)


def test_held_out_batches_of_any_shape_compile_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """They run as written, before and after training: equal bit for bit to those of a run without compiled layers."""
    (written, _), (compiled, _) = (make("xlm-roberta", compiled=c) for c in (False, True))
    before = num_graphs()
    with torch.compiler.set_stance(force_backend="aot_eager"):
        for _ in range(2):
            for rows in (random_rows(3, 20), random_rows(1, 20), random_rows(3, 11)):
                assert torch.equal(compiled.losses_by_row(rows), written.losses_by_row(rows))
                assert torch.equal(compiled.relation_maps(rows), written.relation_maps(rows))
            train_step(compiled, random_rows(3, 20))
    assert num_graphs() - before == 2
    assert not errors(caplog)


def test_names_hooks_and_modes_stay(tmp_path: Path) -> None:
    (_, written), (module, compiled) = (make("xlm-roberta", compiled=c) for c in (False, True))
    assert list(compiled.model.state_dict()) == list(written.model.state_dict())
    assert list(compiled.trained) == list(written.trained)
    assert list(compiled.untrained) == list(written.untrained)
    layers = compiled.model.encoder.layer
    assert [is_compiled(layer) for layer in layers] == [True, True, True, False], "the last one is read"
    seen: list[str] = []
    layers[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    layers[0].register_forward_hook(lambda *_: seen.append("after"))
    with torch.compiler.set_stance(force_backend="eager"):
        module(random_rows(2, 12))
    assert seen == ["before", "after"]
    compiled.model.save_pretrained(tmp_path)
    assert torch.equal(
        tap(type(compiled.model).from_pretrained(tmp_path), 4)(random_rows(2, 12))[0],
        tap(written.model.eval(), 4)(random_rows(2, 12))[0],
    )


def test_a_copy_computes_with_its_own_weights() -> None:
    _, student = make("xlm-roberta", compiled=True)
    twin, rows = copy.deepcopy(student.tapped).eval(), random_rows(2, 12)
    with torch.no_grad():
        for parameter in student.tapped.parameters():
            parameter.zero_()
        with torch.compiler.set_stance(force_backend="eager"):
            assert twin(rows)[0].abs().sum() > 0
        with uncompiled():
            assert twin(rows)[0].abs().sum() > 0


def test_a_linear_function_that_is_replaced_in_the_process_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed replaces it under ZeRO-3. The one here gives its weights no gradients."""
    rows = random_rows(2, 12)
    (written, _), (compiled, _) = (make("bert", compiled=c) for c in (False, True))
    _, gradients = train_step(written, rows)
    own = nn.functional.linear

    def replaced(x, weight, bias=None):
        return own(x, weight.detach(), None if bias is None else bias.detach())

    monkeypatch.setattr(nn.functional, "linear", replaced)
    with torch.compiler.set_stance(force_backend="aot_eager"):
        _, found = train_step(compiled, rows)
    assert nn.functional.linear is replaced
    layer_that_is_read = {name for name in gradients if ".layer.3.projections." in name}
    assert gradients.keys() - found.keys() == layer_that_is_read != set(), "it is not compiled"
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-7)


def test_another_shape_after_the_first_batch_is_an_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """It names what changed, and training continues with the right results."""
    (written, _), (compiled, _) = (make("xlm-roberta", compiled=c) for c in (False, True))
    with torch.compiler.set_stance(force_backend="aot_eager"):
        train_step(compiled, random_rows(3, 20))
        assert not errors(caplog)
        loss, _ = train_step(compiled, random_rows(2, 20))
        assert loss == pytest.approx(train_step(written, random_rows(2, 20))[0], rel=1e-5)
        train_step(compiled, random_rows(2, 20))
    assert len(errors(caplog)) == 2, "once each for teacher and student"
    for key, text in zip(("teacher_options.compile", "student.compile"), errors(caplog), strict=True):
        assert f"`{key}`: a XLMRobertaLayer was compiled again" in text
        width = 48 if key.startswith("teacher") else 24
        assert f": argument 1: float32 [3, 20, {width}] -> float32 [2, 20, {width}]. Training waited" in text
        assert f"--set {key}=false" in text
        assert "\n" not in text


def test_too_many_graphs_end_in_uncompiled_layers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch makes eight graphs at most. Training continues without them, and the log says so once a layer."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # a stance would ignore `fullgraph`
    (written, _), (compiled, _) = (make("xlm-roberta", compiled=c, layers=2) for c in (False, True))
    for length in range(4, 16):
        loss, _ = train_step(compiled, random_rows(2, length))
        assert loss == pytest.approx(train_step(written, random_rows(2, length))[0], rel=1e-5)
    assert sum("From now on it runs uncompiled" in text for text in errors(caplog)) == 3 + 1, (
        "three layers of the teacher and one of the student"
    )


class Unsupported(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x


def test_a_layer_that_cannot_be_compiled_ends_the_run_before_its_first_step() -> None:
    layer = Unsupported()
    compile_layers(SimpleNamespace(complete_layers=[layer]), "student.compile")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"cannot compile a Unsupported: .*--set student\.compile=false") as caught:
        layer(torch.ones(2))
    assert "\n" not in str(caught.value)


def test_compiler_works_here() -> None:
    check_compiler("student.compile", torch.device("cpu"))


@pytest.mark.parametrize("key", ["student.compile", "teacher_options.compile"])
def test_without_a_compiler_nothing_starts(key: str, tiny_recipe: Path, fp32_config: Path, tmp_path: Path) -> None:
    words = ["--recipe", tiny_recipe, "--deepspeed", fp32_config, "--run-dir", tmp_path / "run", "--set", f"{key}=true"]
    ended = subprocess.run(
        [sys.executable, "pipeline/train.py", *map(str, words)],
        cwd=REPO,
        env={**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == EXIT_USER
    error = ended.stderr[ended.stderr.index("error: ") :].strip()
    assert f"`{key}: true`, but torch.compile does not work on cpu here" in error
    assert "g++" in error
    assert f"--set {key}=false" in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()
