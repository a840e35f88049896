"""Lineage and model card of a student: what it was made from, how, and how to load it.

In: `run.json`, a checkpoint's `state.json` and the resolved recipe. Out: the dictionary that export keeps as
`lineage.json`, and the Markdown of its README.md.
"""

from __future__ import annotations

from typing import Any

import yaml
from transformers import PretrainedConfig

CARD = """---
library_name: transformers
tags:
- minilmv2
- distillation
- multilingual
---
# {title}

{layers} layers, width {hidden}, {parameters:.1f} M parameters; distilled from `{teacher}` by MiniLMv2 self-attention
relations (arXiv 2012.15828).

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
model = AutoModel.from_pretrained(DIRECTORY)
hidden = model(**tokenizer(["Hello world!"], return_tensors="pt")).last_hidden_state
```

The encoder is meant to be fine-tuned, or used for sentence vectors by the mean of `last_hidden_state` over real tokens.
It has no pooler: `pooler_output`, where the class offers it, is random. Training matched the queries, keys and values of
the last layer; that layer's output and feed-forward weights are where they started.

## Lineage

| | |
|---|---|
{rows}

## Recipe

```yaml
{recipe}
```
"""
TRIMMED_CARD = """---
library_name: transformers
---
# {from} with a smaller vocabulary

{pieces[1]:,} of {pieces[0]:,} pieces: those that {languages} use at least {min_count} time(s). {parameters:.1f} M parameters. All
other weights are those of `{from}`. `trimming.json` holds the old id of every new one and the coverage per language.
"""
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
    "data_fingerprint": "data fingerprint",
    "recipe_fingerprint": "recipe fingerprint",
    "git_commit": "commit of the code",
    "packages": "versions",
    "precision": "precision of the student in training",
    "trimmed": "vocabulary cut",
}


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
        "data_fingerprint": state["data_fingerprint"],
        "recipe_fingerprint": state["recipe_fingerprint"],
        "git_commit": run["git_commit"],
        "packages": run["packages"],
        "precision": state["precision"],
        "recipe": recipe,
    }


def model_card(lineage: dict[str, Any], config: PretrainedConfig, num_parameters: int) -> str:
    """The README.md of an exported student, or of a model whose vocabulary alone was cut."""
    if "recipe" not in lineage:
        return TRIMMED_CARD.format(**lineage["trimmed"], parameters=num_parameters / 1e6)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    rows = [f"| {label} | {_cell(lineage[key])} |" for key, label in LABELS.items() if key in lineage]
    return CARD.format(
        title=f"MiniLMv2 student, {layers} x {hidden}",
        layers=layers,
        hidden=hidden,
        parameters=num_parameters / 1e6,
        teacher=lineage["teacher"],
        rows="\n".join(rows),
        recipe=yaml.safe_dump(lineage["recipe"], sort_keys=False, allow_unicode=True).rstrip(),
    )


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
