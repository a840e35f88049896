"""One distillation step with its optimizer against a plain training loop; operations and host reads; a cut teacher's saving.

    OMP_NUM_THREADS=1 python benchmarks/bench_step.py [--quick] [--json FILE]

Random weights in the shapes of XLM-R-base (teacher, 12x768, vocabulary 250 002) and MiniLM (student, 6x384), 48 heads. The
step is that of a run: forward, backward and optimizer by `StudentEngine` (ZeRO-1, one rank, fp32). The plain loop is
`NaiveTraining`. Variants take turns in one thread. Times are medians of CPU seconds. Memory is the peak above the loaded
models: gradients, Adam's moments, activations and every copy. It is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import XLMRobertaConfig, XLMRobertaModel

from benchmarks.measure import REPO, arguments, markdown_table, publish
from benchmarks.naive_baseline import NaiveTraining, added_peak_mb, interleaved_cpu_seconds
from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.distiller import DistillModule
from pipeline.distillation.models.student import StudentConfig, build_student
from pipeline.distillation.models.teacher import load_teacher
from pipeline.distillation.tap import tap
from pipeline.runtime import dist
from pipeline.runtime.ds_config import BatchShape, Precisions, resolve
from pipeline.runtime.engine import StudentEngine
from pipeline.runtime.optimizer import OptimizerConfig

HEADS = 48
SHAPES = [(2, 512), (4, 128)]
VARIANTS = ("naive", "fp32", "bf16 teacher", "fp32, embeddings frozen", "bf16 teacher, embeddings frozen")
RATE = 1e-4
OPTIMIZER_PHASE = "optimizer phase"
MODEL_PRODUCTS = ("aten::addmm", "aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu")
MODEL_PRODUCTS_BACKWARD = ("aten::_scaled_dot_product_flash_attention_for_cpu_backward",)
RELATION_LOSS = ("_GradientInForward", "_GradientInForwardBackward")


def xlm_roberta(layers: int, hidden: int, vocabulary: int) -> XLMRobertaModel:
    """Random weights in XLM-R's layout."""
    config = XLMRobertaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    return XLMRobertaModel(config, add_pooling_layer=False).eval()


# -- the step


@dataclass(frozen=True)
class Step:
    """The parts of a step on the same rows."""

    forward: Callable[[], torch.Tensor]
    backward: Callable[[torch.Tensor], object]
    optimizer_phase: Callable[[], object]

    def __call__(self) -> None:
        self.backward(self.forward())
        with record_function(OPTIMIZER_PHASE):
            self.optimizer_phase()


class Models:
    """Teacher and student of every variant, from the same random weights."""

    def __init__(self, batch: int, length: int, vocabulary: int):
        self.input_ids_BL = torch.randint(4, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
        self._teacher = xlm_roberta(12, 768, vocabulary)
        self._half_teacher: torch.nn.Module | None = None

    def loaded(self, variant: str) -> Callable[[], Step]:
        """Load the models of a variant. Returns what prepares its first step: optimizer or engine."""
        student = build_student(self._teacher, StudentConfig(layers=6, hidden=384, heads=12, dropout=0.0), 0)
        if variant == "naive":
            model = student.model.train()

            def prepare_naive() -> Step:
                training = NaiveTraining(self._teacher, model, (12, 6), HEADS)
                return Step(
                    lambda: training.forward(self.input_ids_BL), torch.Tensor.backward, training.optimizer_phase
                )

            return prepare_naive
        if variant.startswith("bf16"):
            self._half_teacher = self._half_teacher or copy.deepcopy(self._teacher).to(torch.bfloat16)
            teacher = load_teacher(self._half_teacher, 12, torch.bfloat16)
        else:
            teacher = load_teacher(self._teacher, 12)
        student.model.get_input_embeddings().weight.requires_grad_("frozen" not in variant)
        module = DistillModule(teacher, student.tapped, RelationsConfig(heads=HEADS, backend="chunked")).train()
        trained = {name: p for name, p in student.trained.items() if p.requires_grad}
        return lambda: engine_step(module, trained, self.input_ids_BL)


def engine_step(
    module: torch.nn.Module, trained: dict[str, torch.nn.Parameter], input_ids_BL: torch.Tensor, precision: str = "fp32"
) -> Step:
    """A step of the student's engine, as a run takes it: ZeRO-1 on one rank."""
    launch = dist.read_launch()
    if not torch.distributed.is_initialized():
        dist.init_process_group(launch, 600)
    optimizer = OptimizerConfig()
    this_cpu = Precisions(fp16=False, bf16=True, bf16_fast=precision == "bf16", device="this CPU")
    batch = BatchShape(input_ids_BL.shape[0], 1)
    config, _ = resolve(REPO / "ds_configs/zero1.json", "the benchmark", optimizer, batch, 1, this_cpu)
    engine = StudentEngine(module, trained, optimizer, config)
    return Step(lambda: engine(input_ids_BL)[0], engine.backward, lambda: engine.step(RATE))


# -- time, memory, shares


def compare(quick: bool) -> tuple[list[list], list[list], dict[str, dict[str, float]]]:
    """Rows of the table of steps and of the time profile, and the ratios to the plain loop."""
    rows, shares, ratios = [], [], {}
    for batch, length in SHAPES[1:] if quick else SHAPES:
        models = Models(batch, length, 2000 if quick else 250_002)
        steps = {variant: models.loaded(variant)() for variant in VARIANTS}
        seconds = interleaved_cpu_seconds(steps, 2 if quick else 7)
        shape = f"B{batch} L{length}"
        shares += [[shape, variant, *time_shares(step, 1 if quick else 5)] for variant, step in steps.items()]
        del steps, models
        peaks = {variant: peak_in_a_new_process(variant, batch, length, quick) for variant in VARIANTS}
        for variant in VARIANTS:
            speed, memory = seconds["naive"] / seconds[variant], peaks[variant] / peaks["naive"]
            rows.append([shape, variant, seconds[variant], speed, peaks[variant], memory])
            if variant != "naive":
                ratios[f"{shape} {variant}"] = {"speed": speed, "memory": memory}
    return rows, shares, ratios


def peak_in_a_new_process(variant: str, batch: int, length: int, quick: bool) -> float:
    """Peak memory of three steps above the loaded models, in MB."""
    words = [sys.executable, __file__, "--memory-of", variant, str(batch), str(length), *(["--quick"] if quick else [])]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def own_peak(variant: str, batch: int, length: int, quick: bool) -> float:
    prepare = Models(batch, length, 2000 if quick else 250_002).loaded(variant)

    def three_steps() -> None:
        step = prepare()
        for _ in range(3):
            step()

    return added_peak_mb(three_steps)


def time_shares(run: Callable[[], None], repeats: int) -> list[str]:
    """Percent of CPU time in the models' products (linear layers and attention), relation loss, optimizer phase, and rest.

    Medians of several profiles.
    """
    parts = torch.tensor([_profiled_parts(run) for _ in range(repeats)]).median(0).values
    return [f"{100 * part:.0f} %" for part in (*parts.tolist(), 1 - float(parts.sum()))]


def _profiled_parts(run: Callable[[], None]) -> tuple[float, float, float]:
    """Shares of the models' products, of the relation loss and of the optimizer phase in one step."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    products = sum(event.self_cpu_time_total for event in events if event.key in MODEL_PRODUCTS)
    # Attention's backward calls kernels that are listed under their own names.
    products += sum(event.cpu_time_total for event in events if event.key in MODEL_PRODUCTS_BACKWARD)
    relation = sum(event.cpu_time_total for event in events if event.key in RELATION_LOSS)
    optimizer = sum(event.cpu_time_total for event in events if event.key == OPTIMIZER_PHASE)
    return products / total, relation / total, optimizer / total


# -- operations, as launches on a GPU


class Operations(TorchDispatchMode):
    """Counts the operations inside the block: on a GPU each is at least one launch. A host read makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.host_reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += 1
        self.host_reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def count_operations() -> dict[str, int]:
    """Operations of a step, by part, and its host reads, for the student of XLM-R-large's job (12 layers).

    They depend on the number of tensors, not on their sizes. The larger count of fp32 and bf16.
    """
    counts = []
    for precision in ("fp32", "bf16"):
        teacher_model = xlm_roberta(2, 192, 2000)
        student = build_student(teacher_model, StudentConfig(layers=12, hidden=48, heads=12, dropout=0.0), 0)
        relations = RelationsConfig(heads=12, backend="chunked")
        module = DistillModule(load_teacher(teacher_model, 2), student.tapped, relations).train()
        input_ids_BL = torch.randint(4, 2000, (2, 16))
        step = engine_step(module, dict(student.trained), input_ids_BL, precision)
        step()
        with Operations() as forward:
            loss = step.forward()
        with Operations() as backward:
            step.backward(loss)
        with Operations() as optimizer:
            step.optimizer_phase()
        of_engine = backward.host_reads + optimizer.host_reads
        of_step = forward.host_reads + of_engine
        counts.append((len(student.trained), backward.total, optimizer.total, of_engine, of_step))
    names = ("trained_tensors", "backward_operations", "optimizer_launches", "host_reads_of_engine", "host_reads")
    return dict(zip(names, map(max, zip(*counts, strict=True)), strict=True))


def cut_saving(quick: bool) -> float:
    """Share of an XLM-R-large-shaped forward that a cut at layer 19 of 24 saves."""
    model = xlm_roberta(24, 256 if quick else 1024, 2000)
    input_ids = torch.randint(4, 2000, (2, 128 if quick else 512))
    tapped = tap(model, 19)
    with torch.inference_mode():
        seconds = interleaved_cpu_seconds(
            {"full": lambda: model(input_ids=input_ids), "cut": lambda: tapped(input_ids)}, 2 if quick else 5
        )
    return 1 - seconds["cut"] / seconds["full"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--memory-of", nargs=3, metavar=("VARIANT", "B", "L"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        variant, batch, length = options.memory_of
        print(json.dumps(own_peak(variant, int(batch), int(length), options.quick)))
        return
    counts = count_operations()
    rows, shares, ratios = compare(options.quick)
    saving = cut_saving(options.quick)
    figures = {"rows": rows, "shares": shares, "optimizer_step": ratios, **counts, "cut_at_19_of_24_saves": saving}
    header = ["shape", "variant", "CPU s", "x naive", "added MB", "of naive"]
    publish("One distillation step with its optimizer", header, rows, figures, options.json)
    print(markdown_table(["shape", "variant", "model products", "relation loss", "optimizer", "rest"], shares))
    print("\n" + ", ".join(f"{name}: {count}" for name, count in counts.items()))
    print(f"\nCutting an XLM-R-large-shaped teacher at layer 19 of 24 saves {saving:.1%} of its forward.")


if __name__ == "__main__":
    main()
