"""Lineage and model card of a student: what it was made from, its figures, how to load it.

    python -m pipeline card STUDENT runs/quickstart runs/evaluation      writes STUDENT/README.md again

Of a run with several students, the figures are those of the student that was exported, or of --student.

In: an export and directories with figures (`card_tables.py`). Out: the content of the export's `lineage.json`, and the
Markdown of its README.md.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data_prep.command_line import end_lines, module_command
from data_prep.durable_files import replace_file
from pipeline.config import tree_of_recipe
from pipeline.distillation.models.architectures import architecture_of, usable_positions
from pipeline.distillation.models.loading import load_config
from pipeline.distillation.models.model_files import read_model
from pipeline.errors import UserError
from pipeline.evaluation.tables import markdown_table
from pipeline.evaluation.training_metadata import training_metadata
from pipeline.export.card_evaluation import Exported
from pipeline.export.card_metadata import front_matter
from pipeline.export.card_tables import measured_sections
from pipeline.export.sentence_transformers_files import DENSE, exported_settings
from pipeline.provenance import START_WEIGHTS
from pipeline.runtime.json_files import read_json
from pipeline.runtime.run_paths import RunPaths, check_is_no_student, one_student, students_of

LINEAGE_FILE, VOCABULARY_FILE, CARD_FILE = "lineage.json", "vocabulary.json", "README.md"
LOADING = """## How to load it

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
model = AutoModel.from_pretrained(DIRECTORY{options})
hidden = model(**tokenizer(["Hello world!"], return_tensors="pt")).last_hidden_state
```"""
SENTENCE_TRANSFORMERS = """```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer(DIRECTORY).encode(["Hello world!"])
```"""
ONNX = (
    "`onnx/model.onnx` (fp32) and `onnx/model_int8.onnx` map `input_ids` and `attention_mask` to `last_hidden_state`."
)
FP16 = "The weights are stored in fp16; `dtype=torch.float32` computes in fp32, as CPUs should."
USE = """The encoder is for fine-tuning, or for sentence vectors: {pooled}.
It has no pooler: `pooler_output`, where the class makes it, is random."""
POOLED = {
    "mean": "the mean of `last_hidden_state` over real tokens",
    "cls": "`last_hidden_state` of the first token",
    "last": "`last_hidden_state` of the last real token",
}
LABELS = {
    "student": "student of the run",
    "teacher": "teacher",
    "teacher_layer": "teacher layer (from 1)",
    "student_layer": "student layer (from 1)",
    "matched_layers": "matched layers",
    "relation_heads": "relation heads",
    "relations": "relations and weights",
    "tail": "term for the output",
    "sentences": "sentence vectors",
    "student_start": "student's start",
    "dropout": "dropout in the distillation, in config.json",
    "steps": "steps",
    "samples": "samples (rows)",
    "ended": "ended early",
    "seq_len": "tokens per row",
    "languages": "languages",
    "vocabulary": "vocabulary cut before training",
    "trimmed": "vocabulary cut after training",
    "data_fingerprint": "data fingerprint",
    "recipe_fingerprint": "recipe fingerprint",
    "git_commit": "commit of the code",
    "packages": "versions",
    "precision": "precision of the student in training",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("student", type=Path, metavar="STUDENT", help="directory that `pipeline export` wrote")
    parser.add_argument(
        "measured", type=Path, nargs="*", metavar="DIR", help="run directories and outputs of `pipeline evaluate`"
    )
    parser.add_argument(
        "--student",
        dest="student_name",
        metavar="NAME",
        help="whose figures, of runs with several students (default: the student that was exported)",
    )


def run(arguments: argparse.Namespace) -> None:
    for directory in (arguments.student, *arguments.measured):
        if not directory.is_dir():
            raise UserError(f"directory {directory} not found. Name existing directories.")
    if not (arguments.student / LINEAGE_FILE).is_file():
        raise UserError(
            f"{arguments.student} has no {LINEAGE_FILE}: it is not an export. Make one: {module_command('pipeline', 'export', 'RUN_DIR', '--output', 'STUDENT')}"
        )
    write_card(arguments.student, _of_student(arguments.measured, arguments.student_name, arguments.student))
    print(end_lines(arguments.student / CARD_FILE))


def _of_student(measured: Sequence[Path], asked: str | None, export: Path) -> list[Path]:
    """The directories with figures; of a run with several students, the directory of the one that is asked for.

    Without `asked` it is the one that `export` is of.
    """
    if asked is not None and not any(students_of(directory) for directory in measured):
        one_student(measured[0] if measured else export, asked)  # raises: it has no students with names
    name = asked or read_json(export / LINEAGE_FILE).get("student")
    for directory in measured:
        check_is_no_student(directory)
    return [
        RunPaths(directory, one_student(directory, name)).files if students_of(directory) else directory
        for directory in measured
    ]


def lineage_of(run: dict[str, Any], state: dict[str, Any], recipe_text: str) -> dict[str, Any]:
    """The lineage of a student, from what its run recorded.

    Args:
        run: content of run.json, and `student`, the student's name in a run with several
        state: content of the checkpoint's state.json
        recipe_text: content of recipe.yaml
    """
    recipe = tree_of_recipe(recipe_text, "the run's recipe.yaml")
    relations, student = recipe["relations"], recipe["student"]
    tail = relations.get("tail", "none")
    return {
        **({"student": run["student"]} if run.get("student") else {}),
        "teacher": run["teacher"],
        **{key: run[key] for key in ("license", "data_sets") if run.get(key)},
        **_matched_layers(run, relations),
        "relation_heads": relations["heads"],
        "relations": relations["pairs"],
        **({} if tail == "none" else {"tail": _tail_of(relations)}),
        **({"sentences": run["sentences"]} if run.get("sentences") else {}),
        "student_start": _start_of(student["init"], state.get("identity") or {}),
        **({"trained_length": run["trained_length"]} if "trained_length" in run else {}),
        **({"dropout": run["dropout"]} if "dropout" in run else {}),
        **_steps_of(state, recipe),
        "seq_len": recipe["seq_len"],
        "languages": run["languages"],
        **({"vocabulary": run["vocabulary"]} if run.get("vocabulary") else {}),
        "data_fingerprint": state["data_fingerprint"],
        "recipe_fingerprint": state["recipe_fingerprint"],
        "git_commit": run["git_commit"],
        "packages": run["packages"],
        "precision": state["precision"],
        **({"identity": state["identity"]} if state.get("identity") else {}),
        "recipe": recipe,
    }


def _tail_of(relations: dict[str, Any]) -> dict[str, float]:
    """Term -> weight."""
    weights = dict.fromkeys(relations["tail"].split("+"), relations["tail_weight"])
    if "pooled" in weights and relations.get("pooled_weight") is not None:
        weights["pooled"] = relations["pooled_weight"]
    return weights


def _steps_of(state: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Steps and samples; of a student that ended before the run, those that it learned from, and why it ended."""
    ended = state.get("ended")
    if not ended:
        return {"steps": state["step"], "samples": state["samples"]}
    return {
        "steps": ended["step"],
        "samples": ended["step"] * recipe["global_batch"],
        "ended": ended["reason"],
    }


def _start_of(init: str, identity: dict[str, str]) -> str:
    return f"{init} (weights {identity[START_WEIGHTS][:12]})" if START_WEIGHTS in identity else init


def _matched_layers(run: dict[str, Any], relations: dict[str, Any]) -> dict[str, Any]:
    """Which layers were matched: two numbers, or two lists and the weights of the pairs.

    Runs of earlier versions did not record which layer `null` meant: the last one.
    """
    pairs = relations.get("layers")
    if not pairs:
        ((teacher, student),) = run.get("matched_layers") or [
            tuple(relations.get(f"{side}_layer") or "last" for side in ("teacher", "student"))
        ]
        return {"teacher_layer": teacher, "student_layer": student}
    return {
        "teacher_layer": [pair["teacher"] for pair in pairs],
        "student_layer": [pair["student"] for pair in pairs],
        "matched_layers": {
            f"teacher {pair['teacher']} with student {pair['student']}, weight": pair["weight"] for pair in pairs
        },
    }


def write_card(directory: Path, measured: Sequence[Path] = (), name: Path | None = None) -> None:
    """Write an export's README.md from the files in it and in `measured`. A file that is up to date is not written.

    `name`: the directory that it is about to become
    """
    path = directory / CARD_FILE
    text = model_card(directory, measured, name)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        replace_file(path, text)


def model_card(directory: Path, measured: Sequence[Path] = (), name: Path | None = None) -> str:
    """The model card: what the model is, how to load it, its figures, its lineage. `name`: as in `write_card`."""
    export = Exported(directory, name or directory)
    lineage = read_json(directory / LINEAGE_FILE)
    config = load_config(directory, "student")
    weights, settings = directory / "model.safetensors", exported_settings(directory)
    recipe = lineage.get("recipe")
    sizes = (
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, {read_model(directory, 'student').num_parameters / 1e6:.1f} M parameters, "
        f"{config.vocab_size:,} pieces, {weights.stat().st_size / 1e6:.0f} MB"
    )
    if recipe is not None:
        origin = (
            f"; distilled from `{_inline(lineage['teacher'])}` by MiniLMv2 self-attention relations "
            "([arXiv 2012.15828](https://arxiv.org/abs/2012.15828))"
        )
    else:
        origin = f"; `{_inline(lineage['trimmed']['from'])}` with a smaller vocabulary; all other weights are unchanged"
    parts = [
        front_matter(lineage, export, measured),
        f"# {'Trimmed encoder' if recipe is None else 'MiniLMv2 student'}, {config.num_hidden_layers} x {config.hidden_size}",
        f"{sizes}{origin}.",
        _loading(directory, half=str(config.dtype).endswith("float16")),
        "\n".join([USE.format(pooled=POOLED[settings.pooling]), *_limits(lineage, config, directory)]),
    ]
    if figures := measured_sections([*measured, directory], lineage.get("steps"), export):
        parts += ["## What was measured", figures]
    if (directory / VOCABULARY_FILE).is_file():
        parts.append(_vocabulary(read_json(directory / VOCABULARY_FILE)))
    rows = [f"| {label} | {_cell(lineage[key])} |" for key, label in LABELS.items() if key in lineage]
    parts += ["## Lineage", "\n".join(["| | |", "|---|---|", *rows])]
    if recipe:
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip()
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        parts.append(f"## Recipe\n\n{fence}yaml\n{text}\n{fence}")
    return "\n\n".join(parts) + "\n"


def _limits(lineage: dict[str, Any], config: Any, directory: Path) -> list[str]:
    """What was not trained: weights above the matched layers, positions after the training rows; and other dropout."""
    recipe = lineage.get("recipe") or {}
    lines = []
    if recipe and recipe.get("relations", {}).get("tail", "none") == "none":
        lines.append(_untrained_tail(lineage.get("student_layer", "last"), config.num_hidden_layers))
    lines += [length_note(directory), prefix_note(directory), projection_note(directory)]
    dropout = lineage.get("dropout")
    if dropout and dropout["distillation"] != dropout["config"]:
        lines.append(
            f"It was distilled with other dropout ({_cell(dropout['distillation'])}) than `config.json` has: that is the "
            "teacher's dropout, for fine-tuning."
        )
    return [line for line in lines if line]


def _untrained_tail(student_layer: Any, num_layers: int) -> str:
    """Weights after the projections of the highest matched layer get no gradient."""
    layers = student_layer if isinstance(student_layer, list) else [student_layer]
    numbers = sorted(num_layers if layer == "last" else layer for layer in layers)
    which = "the last layer" if numbers == [num_layers] else f"layer {', '.join(map(str, numbers))} of {num_layers}"
    of_top = "that layer's" if len(numbers) == 1 else f"layer {numbers[-1]}'s"
    above = "" if numbers[-1] == num_layers else ", and all layers above it,"
    return (
        f"Training matched the queries, keys and values of {which}; {of_top} output and feed-forward weights{above} have "
        "their initial values."
    )


def length_note(directory: Path) -> str:
    """A sentence about inputs longer than the training rows; empty where the rows had every position."""
    about = training_metadata(directory)
    positions, trained = usable_positions(load_config(directory, "student")), about.get("seq_len")
    if trained is None or trained >= positions:
        return ""
    longest = about["longest"]
    if longest is None or longest >= positions:
        return (
            f"It was trained on rows of {trained} tokens and accepts {positions}; the position embeddings after {trained} are "
            f"those of the {about['started_from']}."
        )
    return (
        f"It was trained from random weights on rows of {longest} tokens and accepts {positions}, but positions after {longest} "
        f"were never trained: cut inputs at {longest} tokens (the tokenizer and the sentence-transformers settings do)."
    )


def prefix_note(directory: Path) -> str:
    """A sentence about the text that the teacher's users put before theirs; empty where there is none."""
    prompts = exported_settings(directory).prompts
    if not prompts:
        return ""
    shown = ", ".join(
        f"`{_inline(json.dumps(text, ensure_ascii=False))}` ({_inline(name)})" for name, text in prompts.items()
    )
    return f"The teacher is used with a prefix before the text: {shown}. The text of the distillation had none."


def projection_note(directory: Path) -> str:
    """A sentence about a learned projection of sentence vectors; empty where the export has none."""
    if not (directory / DENSE).is_dir():
        return ""
    config = read_json(directory / DENSE / "config.json")
    is_module = (directory / "modules.json").is_file()
    use = (
        "is a module of the SentenceTransformer"
        if is_module
        else "becomes a module with `export --sentence-transformers`"
    )
    return (
        f"`{DENSE}` is the matrix with which training compared its sentence vectors ({config.get('in_features')} channels) with the "
        f"teacher's ({config.get('out_features')}); it {use}, and `--drop-projection` leaves it out."
    )


def _loading(directory: Path, half: bool) -> str:
    has_pooler = architecture_of(load_config(directory, "student")).has_pooler
    options = (
        ", add_pooling_layer=False" if has_pooler else ""
    )  # else transformers reports the pooler's weights as missing
    parts = [LOADING.format(options=options + (", dtype=torch.float32" if half else ""))]
    if half:
        parts.append(FP16)
    if (directory / "modules.json").is_file():
        parts.append(SENTENCE_TRANSFORMERS)
    if (directory / "onnx" / "model.onnx").is_file():
        parts.append(ONNX)
    return "\n\n".join(parts)


def _vocabulary(about: dict[str, Any]) -> str:
    """Which pieces a smaller vocabulary keeps, and what each language loses."""
    losses = sorted(about["loss"].items(), key=lambda item: -item[1]["kept"])
    rows = [[language, f"{loss['kept']:.4f}", f"{loss['unknown']:.4f}"] for language, loss in losses]
    return (
        f"## Vocabulary\n\n{about['vocab_size']:,} of {about['source_vocab_size']:,} pieces, chosen for "
        f"{', '.join(about['languages'])}. `{VOCABULARY_FILE}` holds the old id of every new one. Text made of kept pieces "
        f"is split as before.\n\n{markdown_table(['language', 'share of tokens kept', 'share unknown'], rows)}"
    )


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_inline, value))
    return f"{value:,}" if isinstance(value, int) else _inline(value)


def _inline(value: Any) -> str:
    """One line of plain text in which no value of a run can end a table, a code span or the front matter, or become markup."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return text.replace("<", "&lt;") if "<" in text else text
