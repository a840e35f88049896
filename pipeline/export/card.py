"""Lineage and model card of a student: what it was made from, how good it is, how to load it.

    python -m pipeline card STUDENT runs/quickstart runs/evaluation      writes STUDENT/README.md again

In: an export and directories with measured figures (measured.py). Out: the dictionary that export keeps as
`lineage.json`, and the Markdown of its README.md. Used by export, by `pipeline card` and by the demo.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.distillation.loading import load_config
from pipeline.distillation.model_files import read_model
from pipeline.errors import UserError
from pipeline.export.measured import measured_sections

LINEAGE_FILE, VOCABULARY_FILE, CARD_FILE = "lineage.json", "vocabulary.json", "README.md"
LOADING = """## How to load it

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
model = AutoModel.from_pretrained(DIRECTORY{dtype})
hidden = model(**tokenizer(["Hello world!"], return_tensors="pt")).last_hidden_state
```"""
SENTENCE_TRANSFORMERS = """```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer(DIRECTORY).encode(["Hello world!"])
```"""
ONNX = "`onnx/model.onnx` (fp32) and `onnx/model_int8.onnx` take `input_ids` and `attention_mask`, give `last_hidden_state`."
FP16 = "The weights are stored in fp16; `dtype=torch.float32` computes in fp32, as CPUs should."
USE = """The encoder is meant to be fine-tuned, or used for sentence vectors by the mean of `last_hidden_state` over real tokens.
It has no pooler: `pooler_output`, where the class offers it, is random."""
UNTRAINED_TAIL = """Training matched the queries, keys and values of the last layer; that layer's output and feed-forward weights are
where they started."""
LABELS = {
    "teacher": "teacher",
    "teacher_layer": "teacher layer (from 1)",
    "relation_heads": "relation heads",
    "relations": "relations and weights",
    "student_start": "student's start",
    "steps": "steps",
    "samples": "samples (rows)",
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


def run(arguments: argparse.Namespace) -> None:
    for directory in (arguments.student, *arguments.measured):
        if not directory.is_dir():
            raise UserError(f"there is no directory {directory}")
    if not (arguments.student / LINEAGE_FILE).is_file():
        raise UserError(f"{arguments.student} has no {LINEAGE_FILE}: it is no export of `python -m pipeline export`.")
    write_card(arguments.student, arguments.measured)
    print(f"model card: {arguments.student / CARD_FILE}")


def lineage_of(run: dict[str, Any], state: dict[str, Any], recipe_text: str) -> dict[str, Any]:
    """Everything that a student can be traced by, from what the run itself wrote down."""
    recipe = yaml.safe_load(recipe_text)
    relations, student = recipe["relations"], recipe["student"]
    return {
        "teacher": run["teacher"],
        "teacher_layer": relations["teacher_layer"] or "last",
        "relation_heads": relations["heads"],
        "relations": relations["pairs"],
        "student_start": student["init"],
        "steps": state["step"],
        "samples": state["samples"],
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


def write_card(directory: Path, measured: Sequence[Path] = ()) -> None:
    """Write an export's README.md from what lies in it and in `measured`; a file that is right already is not touched."""
    path = directory / CARD_FILE
    text = model_card(directory, measured)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def model_card(directory: Path, measured: Sequence[Path] = ()) -> str:
    """The model card: what it is, how to load it, what was measured, where it comes from."""
    lineage = json.loads((directory / LINEAGE_FILE).read_text(encoding="utf-8"))
    config = load_config(directory, "student")
    weights = directory / "model.safetensors"
    recipe = lineage.get("recipe")
    sizes = (
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, {count_parameters(directory) / 1e6:.1f} M parameters, "
        f"{config.vocab_size:,} pieces, {weights.stat().st_size / 1e6:.0f} MB"
    )
    if recipe is not None:
        origin = (
            f"; distilled from `{lineage['teacher']}` by MiniLMv2 self-attention relations "
            "([arXiv 2012.15828](https://arxiv.org/abs/2012.15828))"
        )
    else:
        origin = f"; `{lineage['trimmed']['from']}` with a smaller vocabulary, all other weights as they were"
    parts = [
        _front_matter(lineage, directory),
        f"# {'Trimmed encoder' if recipe is None else 'MiniLMv2 student'}, {config.num_hidden_layers} x {config.hidden_size}",
        f"{sizes}{origin}.",
        _loading(directory, half=str(config.dtype).endswith("float16")),
        USE + ("\n" + UNTRAINED_TAIL if recipe and recipe.get("relations", {}).get("tail", "none") == "none" else ""),
    ]
    if figures := measured_sections([*measured, directory], lineage.get("steps")):
        parts += ["## What was measured", figures]
    if (directory / VOCABULARY_FILE).is_file():
        parts.append(_vocabulary(json.loads((directory / VOCABULARY_FILE).read_text(encoding="utf-8"))))
    rows = [f"| {label} | {_cell(lineage[key])} |" for key, label in LABELS.items() if key in lineage]
    parts += ["## Lineage", "\n".join(["| | |", "|---|---|", *rows])]
    if recipe:
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip()
        parts.append(f"## Recipe\n\n```yaml\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def count_parameters(student: Path) -> int:
    """Numbers in a student's safetensors file, from its header alone."""
    return sum(math.prod(tensor.shape) for tensor in read_model(student, "student").tensors.values())


def _front_matter(lineage: dict[str, Any], directory: Path) -> str:
    """What a model hub reads; languages by their main code (zh-Hans is zh)."""
    content: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "feature-extraction"}
    if (directory / "modules.json").is_file():
        content |= {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
    content["tags"] = ["minilmv2", "distillation", "multilingual"]
    languages = lineage.get("trimmed", lineage).get("languages") or []
    if languages:
        content["language"] = sorted({language.split("-")[0].split("_")[0] for language in languages})
    return "---\n" + yaml.safe_dump(content, sort_keys=False) + "---"


def _loading(directory: Path, half: bool) -> str:
    parts = [LOADING.format(dtype=", dtype=torch.float32" if half else "")]
    if half:
        parts.append(FP16)
    if (directory / "modules.json").is_file():
        parts.append(SENTENCE_TRANSFORMERS)
    if (directory / "onnx" / "model.onnx").is_file():
        parts.append(ONNX)
    return "\n\n".join(parts)


def _vocabulary(about: dict[str, Any]) -> str:
    """What a smaller vocabulary keeps and what it costs every language."""
    rows = [
        f"| {language} | {loss['kept']:.4f} | {loss['unknown']:.4f} |"
        for language, loss in sorted(about["loss"].items(), key=lambda item: -item[1]["kept"])
    ]
    return (
        f"## Vocabulary\n\n{about['vocab_size']:,} of {about['source_vocab_size']:,} pieces, chosen for "
        f"{', '.join(about['languages'])}. `{VOCABULARY_FILE}` holds the old id of every new one. Text made of kept pieces "
        "is split as before.\n\n| language | share of tokens kept | share unknown |\n|---|---:|---:|\n"
        + "\n".join(rows)
    )


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
