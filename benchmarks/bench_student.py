"""One student in every export format: size, speed, retrieval, and its difference from the run's checkpoint.

    OMP_NUM_THREADS=1 python benchmarks/bench_student.py runs/quickstart [--quick] [--json FILE] [--pairs N]

Exports the run's newest checkpoint (fp32, fp16, ONNX fp32 and int8), with the full vocabulary and with that of the
evaluated languages, and compares with the teacher. Speed is measured in CPU seconds of one thread, and the formats take
turns. Retrieval pools the output over the pairs of the run's recipe. Exit code 1: a difference is above its limit.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import onnxruntime
import torch
import transformers
from transformers import AutoModel

from benchmarks.measure import arguments, markdown_table, publish
from benchmarks.naive_baseline import interleaved_cpu_seconds
from data_prep.shards import ShardSet
from data_prep.token_counts import token_counts_of_shards
from data_prep.vocabulary import TrimOptions, open_pieces, trim_vocabulary
from pipeline.config import Recipe, load_recipe
from pipeline.distillation.models.model_files import read_model
from pipeline.distillation.models.vocabulary import read_vocabulary
from pipeline.evaluation.encoder import Encoder, load_encoder
from pipeline.evaluation.retrieval import RetrievalConfig
from pipeline.export.hf import export_run
from pipeline.export.onnx import FILES, HiddenStates, add_onnx, compare_runs
from pipeline.export.trim import trim
from pipeline.runtime.checkpoint import read_model_weights

LANGUAGES = ["de", "ru", "zh-Hans", "ja", "ar", "tr", "id", "fa"]  # are compared, and kept in the trimmed vocabulary
SHAPES, QUICK_SHAPES = [(1, 16), (16, 128)], [(1, 16), (4, 32)]
LIMITS = {"export": 0.0, "ONNX": 1e-4, "int8": 0.02}  # of hidden states, hidden states, retrieval


@dataclass
class Format:
    """One export format: its forward, its tokenizer and its file."""

    name: str
    run: HiddenStates
    encoder: Encoder
    file: Path
    parameters: int


def torch_format(name: str, directory: Path) -> Format:
    encoder = load_encoder(str(directory))

    @torch.inference_mode()
    def run(input_ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        return encoder.model(input_ids=input_ids_BL, attention_mask=mask_BL).last_hidden_state

    file = directory / "model.safetensors"
    return Format(name, run, encoder, file, read_model(directory, "student").num_parameters)


def onnx_format(name: str, like: Format, precision: str) -> Format:
    file = like.file.parent / "onnx" / FILES[precision]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(input_ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        feeds = {"input_ids": input_ids_BL.numpy(), "attention_mask": mask_BL.numpy()}
        return torch.from_numpy(session.run(["last_hidden_state"], feeds)[0])

    return replace(like, name=name, run=run, file=file)


def make_formats(run_dir: Path, recipe: Recipe, config: RetrievalConfig, work: Path) -> list[list[Format]]:
    """Groups of formats that read the same ids. The others of a group are compared with its first."""
    checked = replace(config, max_pairs=min(config.max_pairs, 10))  # as many as the export's own check compares
    student_dir = export_run(run_dir, work / "student", [lambda directory: add_onnx(directory, checked)])
    half = export_run(run_dir, work / "half", dtype=torch.float16)
    vocabulary = make_vocabulary(recipe, [*config_languages(config), "en"], work / "vocabulary")
    trim(student_dir, read_vocabulary(vocabulary), work / "trimmed", [lambda directory: add_onnx(directory, checked)])
    student = torch_format("student, fp32", student_dir)
    trimmed = torch_format("trimmed, fp32", work / "trimmed")
    return [
        [torch_format("teacher, fp32", Path(recipe.teacher))],
        [
            student,
            torch_format("student, fp16 file", half),
            onnx_format("student, ONNX fp32", student, "fp32"),
            onnx_format("student, ONNX int8", student, "int8"),
        ],
        [
            trimmed,
            onnx_format("trimmed, ONNX fp32", trimmed, "fp32"),
            onnx_format("trimmed, ONNX int8", trimmed, "int8"),
        ],
    ]


def config_languages(config: RetrievalConfig) -> list[str]:
    assert config.languages is not None
    return list(config.languages)


def make_vocabulary(recipe: Recipe, languages: list[str], output: Path) -> Path:
    """The vocabulary that these languages use in the run's own shards."""
    shards = ShardSet(recipe.data)
    options = TrimOptions([language for language in languages if language in shards.languages])
    trim_vocabulary(*open_pieces(Path(recipe.tokenizer)), token_counts_of_shards(shards), options, output)
    return output


@torch.inference_mode()
def export_difference(run_dir: Path, exported: Encoder) -> float:
    """Greatest difference of a hidden state between the checkpoint's own weights and the export, on a few sentences."""
    weights, _ = read_model_weights(run_dir)
    model = AutoModel.from_config(exported.model.config, dtype=torch.float32, add_pooling_layer=False).eval()
    model.load_state_dict(weights)
    batch = exported.tokenizer(["Hello world!", "Der Laden ist heute geschlossen."], padding=True, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    states = [one(**inputs).last_hidden_state for one in (model, exported.model)]
    return (states[0] - states[1]).abs().max().item()


def speeds(formats: list[Format], shapes: list[tuple[int, int]], rounds: int) -> dict[str, list[float]]:
    """Speed of each format relative to the first, per shape."""
    ratios: dict[str, list[float]] = {each.name: [] for each in formats}
    for batch, length in shapes:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(
            4, min(len(each.encoder.tokenizer) for each in formats), (batch, length), generator=generator
        )
        mask = torch.ones_like(ids)
        ways: dict[str, Callable[[], Any]] = {each.name: functools.partial(each.run, ids, mask) for each in formats}
        seconds = interleaved_cpu_seconds(ways, rounds)
        for each in formats:
            ratios[each.name].append(seconds[formats[0].name] / seconds[each.name])
    return ratios


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--pairs", type=int, default=120, metavar="N", help="sentence pairs of each language")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    recipe = load_recipe(options.run_dir / "recipe.yaml", [])
    languages = LANGUAGES[: 2 if options.quick else None]
    config = RetrievalConfig(languages=languages, max_pairs=20 if options.quick else options.pairs)
    shapes = QUICK_SHAPES if options.quick else SHAPES
    with tempfile.TemporaryDirectory() as work:
        groups = make_formats(options.run_dir, recipe, config, Path(work))
        parity = export_difference(options.run_dir, groups[1][0].encoder)
        found: dict[str, dict[str, Any]] = {}
        for group in groups:
            report = compare_runs(group[0].encoder, {each.name: each.run for each in group}, config)
            found |= {each.name: report[each.name] for each in group}
        formats = [each for group in groups for each in group]
        ratios = speeds(formats, shapes, 2 if options.quick else 5)
        megabytes = {each.name: each.file.stat().st_size / 1e6 for each in formats}
        sha256 = hashlib.sha256(groups[1][0].file.read_bytes()).hexdigest()
    rows = [
        [
            each.name,
            f"{each.parameters / 1e6:.1f}",
            f"{megabytes[each.name]:.0f}",
            *(f"{ratio:.2f}" for ratio in ratios[each.name]),
            f"{found[each.name]['retrieval_mean']:.4f}",
            f"{found[each.name]['greatest_difference']:.1e}",
        ]
        for each in formats
    ]
    header = [
        "format",
        "M parameters",
        "MB",
        *(f"x teacher, {b}x{length}" for b, length in shapes),
        "retrieval",
        "difference",
    ]
    checks = limits(parity, found)
    figures = {
        "run": str(options.run_dir),
        "weights_sha256": sha256,
        "languages": config.languages,
        "pairs": config.max_pairs,
    }
    publish("A student in every format", header, rows, {**figures, "rows": rows, "checks": checks}, options.json)
    print(markdown_table(["check", "measured", "limit", "holds"], checks))
    return 0 if all(check[3] == "yes" for check in checks) else 1


def limits(parity: float, found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Every limit, the measured value, and whether it holds."""
    checks = [["hidden states, export to checkpoint", parity, LIMITS["export"]]]
    for kind in ("student", "trimmed"):
        base, onnx, int8 = (found[f"{kind}, {each}"] for each in ("fp32", "ONNX fp32", "ONNX int8"))
        checks.append([f"hidden states, {kind} ONNX to torch", onnx["greatest_difference"], LIMITS["ONNX"]])
        lost = base["retrieval_mean"] - int8["retrieval_mean"]
        checks.append([f"retrieval lost by int8, {kind}", lost, LIMITS["int8"]])
    return [[what, f"{value:.2g}", f"{most:g}", "yes" if value <= most else "NO"] for what, value, most in checks]


if __name__ == "__main__":
    sys.exit(main())
