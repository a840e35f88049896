"""Writes the files with which an exported encoder loads as a `SentenceTransformer`: mean over tokens, then unit length.

In: a Hugging Face directory. Out: `modules.json` and the settings of its three modules in the same directory, which still
loads with `AutoModel`. The package itself is not needed.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.distillation.models.loading import load_config
from pipeline.export.handover import longest_input

MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))


def add_sentence_transformers(directory: Path) -> None:
    """Write the files. Inputs are cut at the longest length that the export can be used with."""
    width, max_length = load_config(directory, "student").hidden_size, longest_input(directory)
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(MODULES)
    ]
    for path, _ in MODULES[1:]:
        (directory / path).mkdir()
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    for name, content in (
        ("modules.json", modules),
        ("sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False}),
        ("config_sentence_transformers.json", {"similarity_fn_name": "cosine"}),
        ("1_Pooling/config.json", pooling),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
