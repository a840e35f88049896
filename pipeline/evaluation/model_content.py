"""What an evaluated model is by its content: kept results and figures belong to the weights that they were measured with.

In: a model's directory. Out: hashes of what determines its hidden states and its sentence vectors.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.file_hashes import xxh3_128_of_file
from pipeline.evaluation.pooling import SentencePooling
from pipeline.provenance import fingerprint
from pipeline.runtime.json_files import read_json_if_there

VOCABULARY_FILES = ("tokenizer.json", "*.model", "vocab.txt", "vocab.json")
TOKENIZER_CONFIG = "tokenizer_config.json"
# Of tokenizer_config.json, what changes the ids of a text even where there is a tokenizer.json.
TOKENIZER_SETTINGS = (
    *("do_lower_case", "strip_accents", "tokenize_chinese_chars"),
    *("add_prefix_space", "add_bos_token", "add_eos_token"),
)


def content_of(directory: Path) -> list[str]:
    """Hashes of weights, config and vocabulary, and the settings of the tokenizer that change ids."""
    patterns = ("config.json", "*.safetensors", *VOCABULARY_FILES, "merges.txt")
    files = sorted({path for pattern in patterns for path in directory.glob(pattern)})
    settings = read_json_if_there(directory / TOKENIZER_CONFIG)
    chosen = {key: settings[key] for key in TOKENIZER_SETTINGS if key in settings}
    hashes = [f"{path.name} {xxh3_128_of_file(path)}" for path in files]
    return [*hashes, *([f"{TOKENIZER_CONFIG} {fingerprint(chosen)}"] if chosen else [])]


def identity_of(content: list[str], values_layer: int, pooling: SentencePooling | None) -> str:
    """A fingerprint that differs between two models of one name. `pooling`: None where `content` determines it."""
    return fingerprint([content, values_layer, *(pooling.content if pooling else [])])
