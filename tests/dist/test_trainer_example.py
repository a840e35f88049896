"""examples/with_trainer.py: the pipeline's loss in a Hugging Face Trainer, on one process and on two that torchrun starts."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding

from data_prep.command_line import installed_program
from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.distiller import DistillModule
from pipeline.distillation.models.student import Student, StudentConfig, build_student
from pipeline.distillation.models.teacher import load_encoder, load_teacher
from pipeline.errors import UserError
from tests.conftest import REPO
from tests.dist.ports import free_port
from tests.dist.runs import finish, start

HEADS = 12
SCRIPT = "examples/with_trainer.py"
STEPS = 6
SHAPE = StudentConfig(layers=2, hidden=24, heads=4)
OPTIONS = {
    "text": str(REPO / "samples/cc100/de.txt.xz"),
    **{
        "max_length": 48,
        "heldout": 16,
        "layers": 2,
        "hidden": 24,
        "heads": 4,
        "init": "random",
        "relation_heads": HEADS,
    },
    **{"max_steps": STEPS, "learning_rate": 3e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "save_steps": 2},
    **{"eval_strategy": "steps", "eval_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True},
}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    for package in ("accelerate", "datasets"):
        pytest.importorskip(package, reason="pip install -r requirements-dev.txt")
    from examples import with_trainer

    return with_trainer


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `datasets`, for all runs."""
    return tmp_path_factory.mktemp("datasets")


def words(teacher: Path, output: Path, **more: object) -> list[str]:
    options = {"teacher": teacher, "output_dir": output, "per_device_train_batch_size": 8, **OPTIONS, **more}
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def run_here(example: ModuleType, cache: Path, arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        patch.setattr("sys.argv", [SCRIPT, *arguments])
        example.main()


@pytest.fixture(scope="module")
def alone(example: ModuleType, cache: Path, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student of one process."""
    output = tmp_path_factory.mktemp("trainer") / "alone"
    run_here(example, cache, words(tiny_teacher, output))
    return output


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("is_half", [False, True], ids=["fp32", "bf16 autocast"])
def test_its_loss_is_the_pipelines(example: ModuleType, tiny_teacher: Path, tmp_path: Path, is_half: bool) -> None:
    """On texts of different lengths, with the gradient of every parameter."""
    tokenizer, teacher = AutoTokenizer.from_pretrained(tiny_teacher), load_encoder(tiny_teacher)
    student = build_student(teacher, SHAPE, seed=0)
    batch = DataCollatorWithPadding(tokenizer)(
        [tokenizer(text) for text in ("eins", "zwei drei vier fünf", "sechs. " * 9)]
    )
    lengths_B = batch["attention_mask"].sum(1)
    assert len(set(lengths_B.tolist())) == 3
    arguments = example.TrainingArguments(str(tmp_path), use_cpu=True, bf16=is_half, report_to="none")
    trainer = example.DistillationTrainer(teacher, student, HEADS, args=arguments, processing_class=tokenizer)
    model = trainer.accelerator.prepare(trainer.model)  # as `train` does
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    found = gradients_of(student)

    own = build_student(teacher, SHAPE, seed=0)
    distiller = DistillModule(load_teacher(teacher), own.tapped, RelationsConfig(heads=HEADS))
    exact, _ = distiller(batch["input_ids"], lengths_B)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        expected, _ = distiller(batch["input_ids"], lengths_B)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() == pytest.approx(exact.item(), rel=0.03 if is_half else 1e-6)
    assert (loss.item() != exact.item()) == is_half, "autocast has no effect"
    ours, theirs = (torch.cat([x.flatten() for x in grads]) for grads in (found, gradients_of(own)))
    # The Trainer rounds the gradient of Q, K, V to bf16 later than the pipeline.
    assert (ours - theirs).norm() < (0.02 if is_half else 1e-5) * theirs.norm()


def gradients_of(student: Student) -> list[torch.Tensor]:
    assert all(parameter.grad is not None for parameter in student.trained.values())
    return [parameter.grad.clone() for parameter in student.trained.values() if parameter.grad is not None]


def losses(directory: Path, key: str = "loss") -> list[float]:
    history = json.loads((directory / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def test_the_student_has_learned_and_loads(alone: Path, tiny_teacher: Path) -> None:
    heldout = losses(alone, "eval_loss")
    assert len(heldout) == 4, "before the first step and after 2, 4 and 6"
    assert heldout == sorted(heldout, reverse=True)
    for directory in (alone, alone / "checkpoint-2"):
        model, report = AutoModel.from_pretrained(directory, output_loading_info=True, add_pooling_layer=False)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 24)
    ids = [AutoTokenizer.from_pretrained(directory)("Ein Satz.")["input_ids"] for directory in (alone, tiny_teacher)]
    assert ids[0] == ids[1]


def test_two_processes_train_the_student_of_one(alone: Path, cache: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """With half the texts each: gradients are averaged, so losses and weights are those of one process."""
    command = [installed_program("torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()), SCRIPT]
    more = words(tiny_teacher, tmp_path / "two", per_device_train_batch_size=4, ddp_backend="gloo")
    run = start([*command, *more], tmp_path / "log", HF_DATASETS_CACHE=str(cache))
    output = finish(run, tmp_path / "log")
    assert output.count("held-out loss ") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), rel=1e-5)
    found, expected = weights_of(tmp_path / "two"), weights_of(alone)
    # Softmax cancels a bias of all keys: AdamW makes steps of the rounding errors in its gradient.
    for name in found.keys() - {"encoder.layer.0.attention.self.key.bias"}:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_a_checkpoint_is_resumed_and_the_best_is_kept(
    alone: Path, example: ModuleType, cache: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """The best is here the one with the highest loss, so that it is not the last."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    resumed = words(tiny_teacher, tmp_path, resume_from_checkpoint=alone / "checkpoint-2", **best)
    run_here(example, cache, resumed)
    last, kept = weights_of(tmp_path / f"checkpoint-{STEPS}"), weights_of(tmp_path)
    for name, tensor in weights_of(alone).items():
        assert torch.equal(tensor, last[name]), name
    assert any(not torch.equal(kept[name], last[name]) for name in kept)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights_of(tmp_path / "checkpoint-4").items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "nowhere/*.txt"}, r"no file is called nowhere.*--text"),
        ({"heldout": 10**6}, r"\d+ lines with text, and 1000000 are held out. Set --heldout lower"),
    ],
)
def test_text_that_is_not_there(
    example: ModuleType, cache: Path, tiny_teacher: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_here(example, cache, words(tiny_teacher, tmp_path, **changes))


def test_gradients_that_would_not_be_averaged_are_an_error(
    example: ModuleType, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_encoder(tiny_teacher)
    arguments = example.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    make = partial(example.DistillationTrainer, teacher, build_student(teacher, SHAPE, seed=0), HEADS)
    trainer = make(args=arguments)
    monkeypatch.setattr(example.TrainingArguments, "world_size", 2)
    ids_BL = torch.randint(5, 200, (2, 8))
    with pytest.raises(UserError, match="--eval_on_start true"):
        trainer.training_step(trainer.model, {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)})
    monkeypatch.setattr(example.TrainingArguments, "n_gpu", 2)
    with pytest.raises(UserError, match="torchrun --nproc-per-node 2"):
        make(args=arguments)
