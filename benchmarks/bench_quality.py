"""Quality of a student after a fixed number of tokens: initializations, layers, rates, heads and tail terms side by side.

    python -m demo.teacher && python -m data_prep prepare --input samples/cc100 --tokenizer artifacts/teacher \
        --output artifacts/shards
    python benchmarks/bench_quality.py [--steps 100] [--rows 16] [--only base tail_mse] [--plot FILE.png] [--json FILE]
    python benchmarks/bench_quality.py --precision bf16 --sweep pooled --steps 150 400 [--json FILE]
    python benchmarks/bench_quality.py --sweep starts --steps 0 [--json FILE]     (untrained, by the layers that are copied)
    python benchmarks/bench_quality.py --merge FILE.json FILE.json --plot FILE.png        (one table of several runs)

The variants of one run read the same rows in the same order and share one teacher forward per step. Each is a
`DistillModule` with AdamW, as in training, in one process without DeepSpeed. Columns: relation loss on held-out rows (of
the base recipe's relations, so variants can be compared), retrieval accuracy (mean of both directions over the language
pairs) pooled from the output, the input of the last layer, and the values of the last layer; and the student's sentence
vectors (mean over the tokens of the output) against the teacher's on lines of held-out rows: mean cosine (through the
projection that the student has learned, where widths differ), and Spearman correlation of the cosines of all pairs of
lines, as in STS with the teacher in the place of people. `--sweep pooled` compares `relations.tail: pooled` with `mse`,
`--sweep kinds` one change of each kind.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.measure import arguments, publish
from benchmarks.quality_variants import BASE, SWEEPS, VARIANTS
from data_prep.shards import ShardSet
from pipeline.data.batches import BatchOptions, BatchSource
from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.distiller import DistillModule
from pipeline.distillation.models.projection import Calibration
from pipeline.distillation.models.student import Student, build_student
from pipeline.distillation.models.teacher import cast_parameters, load_encoder
from pipeline.distillation.tap import tap
from pipeline.evaluation.encoder import POOLINGS, Encoder, batches_by_length, pad_rows
from pipeline.evaluation.pooling import MEAN
from pipeline.evaluation.retrieval import RetrievalConfig, evaluate_retrieval
from pipeline.evaluation.sts import spearman
from pipeline.runtime.optimizer import OptimizerConfig, learning_rate, parameter_groups
from pipeline.training.build import CALIBRATION_TOKENS

TOKENS, ROWS_AT_ONCE = 128, 16
SHORTEST_LINE = 6  # tokens, </s> included; shorter ones are often cut at the edge of a row
RETRIEVAL = RetrievalConfig(max_pairs=120)


class InPrecision(torch.nn.Module):
    """The tapped student with its matrix products in `dtype`. Weights, gradients and loss stay fp32."""

    def __init__(self, tapped: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.tapped, self.dtype, self.widths = tapped, dtype, tapped.widths

    def forward(self, *inputs):
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return self.tapped(*inputs)


class SharedTeacher:
    """One forward of the complete teacher per batch; each variant reads its own layer."""

    def __init__(self, model, layers: list[int], dtype: torch.dtype) -> None:
        self.layers = layers
        self.tapped = cast_parameters(tap(model, layers, with_output=True), dtype).eval()
        self.batch: torch.Tensor | None = None

    def reader(self, relations: RelationsConfig):
        number = self.layers.index(relations.teacher_layer or self.layers[-1])

        def read(input_ids_BL, mask_BL):
            if input_ids_BL is not self.batch:
                self.batch = input_ids_BL
                self.projections, self.output = self.tapped(input_ids_BL, mask_BL)
            projections = self.projections[number]
            return projections if relations.tail == "none" else (projections, self.output)

        return read


@dataclasses.dataclass(frozen=True)
class Shared:
    """What all variants of one run share."""

    teacher_model: torch.nn.Module
    teacher: SharedTeacher
    source: BatchSource
    seed: int
    dtype: torch.dtype


class Lines:
    """Lines of the held-out rows, and the teacher's sentence vectors of them."""

    def __init__(self, source: BatchSource, teacher: Encoder) -> None:
        bos, eos = source.shards.bos_id, source.shards.eos_id
        rows = [row[1:-1] for language in source.languages for row in source.heldout(language)]
        parts = [part[part != eos] for row in rows for part in np.split(row, np.flatnonzero(row == eos) + 1)]
        self.ids = [[bos, *part.tolist(), eos] for part in parts if len(part) >= SHORTEST_LINE]
        self._teacher_ND = self._vectors(teacher)

    @torch.inference_mode()
    def _vectors(self, encoder: Encoder) -> torch.Tensor:
        """Unit vectors, in the order of `ids`."""
        batches = batches_by_length(self.ids, RETRIEVAL.batch_size)
        vectors = []
        for batch in batches:
            ids_BL, mask_BL = pad_rows([self.ids[i] for i in batch], encoder.tokenizer.pad_token_id, encoder.device)
            states_BLD = encoder.model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
            vectors.append(MEAN(states_BLD, mask_BL))
        return torch.cat(vectors)[torch.argsort(torch.tensor([number for batch in batches for number in batch]))]

    @torch.inference_mode()
    def likeness(self, encoder: Encoder, projection: torch.nn.Module | None = None) -> dict[str, float]:
        """How alike the model's vectors and the teacher's are: `cosine`, where they have one width, and `sts`."""
        own_Nd = self._vectors(encoder)
        in_teachers_Nd = own_Nd if projection is None else projection(own_Nd)
        of_pairs = [(x @ x.T)[*torch.triu_indices(len(x), len(x), 1)].numpy() for x in (own_Nd, self._teacher_ND)]
        found = {"sts": spearman(*of_pairs)}
        if in_teachers_Nd.shape == self._teacher_ND.shape:
            found["cosine"] = torch.cosine_similarity(in_teachers_Nd, self._teacher_ND).mean().item()
        return found


class Run:
    """One variant in training."""

    def __init__(self, name: str, shared: Shared) -> None:
        self.name, self.variant = name, VARIANTS[name]
        variant, teacher_model, teacher = self.variant, shared.teacher_model, shared.teacher
        relations, calibration = variant.relations, None
        if variant.calibrated:
            rows_BL = torch.from_numpy(shared.source.batch(np.arange(CALIBRATION_TOKENS // TOKENS)))
            calibration = Calibration(rows_BL, relations.heads)
        self.student: Student = build_student(
            teacher_model,
            variant.student,
            shared.seed,
            relations,
            calibration,
        )
        basis_Dd = self.student.basis_Dd
        self.student.untrained.clear()  # training changes the model itself, so the untrained weights need not be restored
        if "embeddings" in variant.student.freeze and variant.student.init == "layers":
            self.student.model.get_input_embeddings().weight.data = teacher_model.get_input_embeddings().weight.data
        tapped = InPrecision(self.student.tapped, shared.dtype)
        projection, reader = self.student.projection, teacher.reader(relations)
        self.module = DistillModule(reader, tapped, relations, basis_Dd, projection=projection).train()
        tapped_last = InPrecision(tap(self.student.model, variant.student.layers), shared.dtype)
        self.heldout = DistillModule(teacher.reader(BASE), tapped_last, BASE)
        self.optimizer_config = OptimizerConfig(lr=variant.rate, warmup_steps=10)
        groups = parameter_groups(self.student.trained, self.optimizer_config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=self.optimizer_config.eps)
        self.seconds = 0.0

    def step(self, input_ids_BL: torch.Tensor, step: int, steps: int) -> float:
        began = time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.optimizer_config, step, steps)
        loss, _ = self.module(input_ids_BL)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.trained.values(), self.optimizer_config.gradient_clipping)
        self.optimizer.step()
        self.seconds += time.process_time() - began
        return loss.item()

    def evaluate(self, source: BatchSource, tokenizer, lines: Lines) -> dict[str, float]:
        heldout = np.concatenate([source.heldout(language) for language in source.languages])
        batches = torch.from_numpy(heldout).split(ROWS_AT_ONCE)
        losses = torch.cat([self.heldout.losses_by_row(batch) for batch in batches])
        encoder = Encoder(self.name, self.student.model.eval(), tokenizer, self.variant.student.layers, self.name)
        accuracy = evaluate_retrieval(encoder, RETRIEVAL)["mean"]
        vectors = lines.likeness(encoder, self.student.projection)
        self.student.model.train()
        return {"heldout": float(losses.mean()), **accuracy, **vectors}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--teacher", default="artifacts/teacher")
    parser.add_argument("--data", default="artifacts/shards")
    parser.add_argument("--steps", type=int, nargs="+", default=[100], help="several: a training of each length")
    parser.add_argument("--rows", type=int, default=16, help="rows of 128 tokens per step")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--sweep", choices=SWEEPS, help="the variants of a comparison, instead of --only")
    parser.add_argument("--seed", type=int, default=0, help="of the sample order and of random initializations")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of teacher and student products")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the retrieval columns")
    parser.add_argument("--save", type=Path, metavar="DIR", help="keep the students: DIR/VARIANT-STEPS, for `evaluate`")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="JSON", help="make one table of earlier --json files")
    options = parser.parse_args()
    options.only = SWEEPS[options.sweep] if options.sweep else options.only
    if options.quick:
        options.steps, options.only = [4], options.only[:2] if options.sweep else ["base", "tail_mse"]
    if options.merge:
        parts = [json.loads(file.read_text()) for file in options.merge]
    else:
        parts = [measure(options, steps) for steps in options.steps]
    if len({part["steps"] for part in parts}) > 1:
        parts = [{**part, "students": _with_steps(part)} for part in parts]
        parts[0]["steps"] = " and ".join(map(str, sorted({part["steps"] for part in parts})))
    steps, rows, precision = (parts[0][key] for key in ("steps", "rows", "precision"))
    seeds = sorted({part["seed"] for part in parts})
    figures: dict[str, dict[str, float]] = {}
    for part in parts:
        figures |= {name: row for name, row in part["students"].items() if row not in figures.values()}
    table = [
        [
            name,
            *(row.get(key, "-") for key in ("heldout", *POOLINGS, "cosine", "sts", "cpu_seconds")),
        ]
        for name, row in figures.items()
    ]
    title = f"Students after {steps} steps of {rows} x {TOKENS} tokens, {precision}, seed {', '.join(map(str, seeds))}"
    retrieval = [f"retrieval, {pooling}" for pooling in POOLINGS]
    header = ["student", "held-out loss", *retrieval, "cosine to teacher", "STS with teacher", "CPU s (with its share)"]
    if options.plot:
        draw(figures, options.plot)
    about = {"steps": steps, "rows": rows, "precision": precision, "seed": seeds[0]}
    publish(title, header, table, {**about, "students": figures}, options.json)


def _with_steps(part: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The students of one table, with their number of steps in the names of those that were trained."""
    trained = {name for name, row in part["students"].items() if "cpu_seconds" in row}
    return {f"{n}, {part['steps']} steps" if n in trained else n: row for n, row in part["students"].items()}


def measure(options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Train and evaluate the chosen variants side by side."""
    torch.manual_seed(0)
    teacher_model = load_encoder(options.teacher)
    tokenizer = AutoTokenizer.from_pretrained(options.teacher, trust_remote_code=False)
    source = BatchSource(ShardSet(options.data), BatchOptions(TOKENS, 0.3, options.seed, heldout_rows=4))
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    chosen = {name: VARIANTS[name] for name in options.only}
    last = teacher_model.config.num_hidden_layers
    layers = sorted({variant.relations.teacher_layer or last for variant in chosen.values()} | {last})
    teacher = SharedTeacher(load_encoder(options.teacher), layers, dtype)
    encoder = Encoder("teacher", teacher_model, tokenizer, last, options.teacher)
    lines = Lines(source, encoder)
    figures = {"teacher": {**evaluate_retrieval(encoder, RETRIEVAL)["mean"], **lines.likeness(encoder)}}
    shared = Shared(teacher_model, teacher, source, options.seed, dtype)
    runs = [Run(name, shared) for name in chosen]
    first_of_start = {str([run.variant.student, run.variant.calibrated]): run for run in reversed(runs)}
    for run in first_of_start.values():
        figures[f"{run.name}, untrained"] = run.evaluate(source, tokenizer, lines)
    for step, batch in enumerate(tqdm(list(_batches(source, steps, options.rows)), unit="step")):
        for run in runs:
            run.step(batch, step, steps)
    for run in runs if steps else []:
        figures[run.name] = {**run.evaluate(source, tokenizer, lines), "cpu_seconds": run.seconds}
        if options.save:
            tokenizer.save_pretrained(options.save / f"{run.name}-{steps}")
            run.student.model.save_pretrained(options.save / f"{run.name}-{steps}")
    about = {
        "steps": steps,
        "num_lines": len(lines.ids),
        "rows": options.rows,
        "precision": options.precision,
        "seed": options.seed,
    }
    return {**about, "students": figures}


def draw(figures: dict[str, dict[str, float]], file: Path) -> None:
    """Draw the retrieval accuracy of every student as three bars, one per pooling."""
    figure = Figure(figsize=(7, 0.5 * len(figures) + 1.5), layout="constrained")
    axes = figure.subplots()
    for place, pooling in enumerate(POOLINGS):
        positions = [row + 0.27 * (place - 1) for row in range(len(figures))]
        axes.barh(positions, [row[pooling] for row in figures.values()], height=0.25, label=pooling)
    axes.set_yticks(range(len(figures)), list(figures))
    axes.invert_yaxis()
    axes.set(xlabel="retrieval accuracy, mean of both directions and all pairs", xlim=(0, 1))
    axes.grid(True, axis="x", alpha=0.3)
    figure.legend(title="pooled from", loc="outside lower center", ncols=len(POOLINGS))
    figure.savefig(file, dpi=120)


def _batches(source: BatchSource, steps: int, rows: int) -> Iterator[torch.Tensor]:
    for step in range(steps):
        yield torch.from_numpy(source.batch(np.arange(step * rows, (step + 1) * rows)))


if __name__ == "__main__":
    main()
