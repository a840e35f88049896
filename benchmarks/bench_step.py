"""One distillation step, forward and backward, against the naive baseline; the saving of a cut teacher; a time profile.

    OMP_NUM_THREADS=1 python benchmarks/bench_step.py [--quick] [--json FILE]

Random weights in the shapes of XLM-R-base (teacher, 12x768, vocabulary 250 002) and MiniLM (student, 6x384), 48 heads.
The optimizer is left out, because it is the same for all variants. They take turns in one thread. Times are medians of CPU
seconds, memory is the peak above the loaded models.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import XLMRobertaConfig, XLMRobertaModel

from benchmarks.measure import arguments, markdown_table, publish
from benchmarks.naive_baseline import HookedEncoder, added_peak_mb, interleaved_cpu_seconds, naive_relation
from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.distiller import DistillModule
from pipeline.distillation.models.student import StudentConfig, build_student
from pipeline.distillation.models.teacher import FrozenTeacher, load_teacher
from pipeline.distillation.tap import tap

HEADS = 48
SHAPES = [(2, 512), (4, 128)]
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


def step_variants(vocabulary: int, input_ids: torch.Tensor) -> dict[str, Callable[[], None]]:
    """Variants of the same step.

    Gradients are allocated in every step and released at its end, as DeepSpeed's ZeRO stages do. No step adds to an old
    gradient, and the memory of gradients is part of the peak.
    """
    teacher_model = xlm_roberta(12, 768, vocabulary)
    relations = RelationsConfig(heads=HEADS, backend="chunked")
    shape = StudentConfig(layers=6, hidden=384, heads=12, dropout=0.0)

    def naive_step() -> Callable[[], None]:
        student_model = build_student(teacher_model, shape, 0).model.train()
        teacher, student = HookedEncoder(teacher_model, 12), HookedEncoder(student_model, 6)

        def run() -> None:
            with torch.no_grad():
                of_teacher = teacher(input_ids)
            of_student = student(input_ids)
            sum(naive_relation(t, s, HEADS) for t, s in zip(of_teacher, of_student, strict=True)).backward()
            student_model.zero_grad(set_to_none=True)

        return run

    def product_step(teacher: FrozenTeacher, freeze: bool) -> Callable[[], None]:
        student = build_student(teacher_model, shape, 0)
        student.model.get_input_embeddings().weight.requires_grad_(not freeze)
        module = DistillModule(teacher, student.tapped, relations).train()

        def run() -> None:
            module(input_ids)[0].backward()
            module.zero_grad(set_to_none=True)

        return run

    half_teacher = load_teacher(copy.deepcopy(teacher_model), 12, torch.bfloat16)
    return {
        "naive": naive_step(),
        "own, fp32": product_step(load_teacher(teacher_model, 12), False),
        "own, fp32, embeddings frozen": product_step(load_teacher(teacher_model, 12), True),
        "own, bf16 teacher": product_step(half_teacher, False),
        "own, bf16 teacher, embeddings frozen": product_step(half_teacher, True),
    }


def compare(quick: bool) -> tuple[list[list], list[list]]:
    """Rows of the table of steps, and of the time profile."""
    rows, shares = [], []
    for batch, length in SHAPES[1:] if quick else SHAPES:
        vocabulary = 2000 if quick else 250_002
        input_ids = torch.randint(4, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
        variants = step_variants(vocabulary, input_ids)
        seconds = interleaved_cpu_seconds(variants, 2 if quick else 7)
        peaks = {variant: added_peak_mb(run) for variant, run in variants.items()}
        for variant, run in variants.items():
            name = f"B{batch} L{length}"
            gain = seconds["naive"] / seconds[variant]
            rows.append([name, variant, seconds[variant], gain, peaks[variant], peaks[variant] / peaks["naive"]])
            shares.append([name, variant, *time_shares(run, 1 if quick else 5)])
    return rows, shares


def time_shares(run: Callable[[], None], repeats: int) -> list[str]:
    """Percent of CPU time in the models' products (linear layers and attention), in the relation loss, and in the rest.

    Medians of several profiles.
    """
    parts = torch.tensor([_profiled_parts(run) for _ in range(repeats)]).median(0).values
    return [f"{100 * part:.0f} %" for part in (*parts.tolist(), 1 - float(parts.sum()))]


def _profiled_parts(run: Callable[[], None]) -> tuple[float, float]:
    """Shares of the models' products and of the relation loss in one step."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    products = sum(event.self_cpu_time_total for event in events if event.key in MODEL_PRODUCTS)
    # Attention's backward calls kernels that are listed under their own names.
    products += sum(event.cpu_time_total for event in events if event.key in MODEL_PRODUCTS_BACKWARD)
    relation = sum(event.cpu_time_total for event in events if event.key in RELATION_LOSS)
    return products / total, relation / total


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
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    rows, shares = compare(options.quick)
    saving = cut_saving(options.quick)
    figures = {"rows": rows, "shares": shares, "cut_at_19_of_24_saves": saving}
    header = ["shape", "variant", "CPU s", "x naive", "added MB", "of naive"]
    publish("One distillation step, forward and backward", header, rows, figures, options.json)
    print(markdown_table(["shape", "variant", "model products", "relation loss", "rest"], shares))
    print(f"\nCutting an XLM-R-large-shaped teacher at layer 19 of 24 saves {saving:.1%} of its forward.")


if __name__ == "__main__":
    main()
