"""Functions of the tests that compare ids: a text, an expected error, and running a printed command."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from data_prep.shards import DataError, ShardSet
from tests.unit.data_prep.corpus import run

TEXT = ["The quick ☺ brown Fox zblorg [SEP] x", "Élève naïve 😀 東京", "a </s> b <mask> c", "the lazy dog"]

XLMR = {"tokenizer_class": "XLMRobertaTokenizer"}


def write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def changed(file: Path, **changes: object) -> None:
    write(file, {**json.loads(file.read_text()), **changes})


def error_of(text: Path, tokenizer: Path, output: Path) -> str:
    """The message of the expected `DataError`, which must be one line. Nothing may be written."""
    with pytest.raises(DataError) as error:
        run(text, tokenizer, output)
    assert not output.exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def paste(message: str) -> None:
    """Run the command that a message prints, with this Python."""
    command = re.search(r"(python -c '[^']*')", message)
    assert command is not None, message
    program, *arguments = shlex.split(command[1])
    assert program == "python"
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def assert_ids_are_the_models(text: Path, tokenizer: Path, output: Path) -> ShardSet:
    """Prepare the text and compare every line without special tokens with AutoTokenizer, and check the counts."""
    assert run(text, tokenizer, output) == []
    shards, reference = ShardSet(output), AutoTokenizer.from_pretrained(tokenizer)
    stream = shards.stream("en", 0, shards.num_tokens("en"))
    lines = np.split(stream, np.flatnonzero(stream == shards.eos_id) + 1)[:-1]
    assert len(lines) == len(TEXT)
    for line, ids in zip(TEXT, lines, strict=True):
        if not any(special in line for special in reference.all_special_tokens):
            assert [shards.bos_id, *ids.tolist()] == reference(line)["input_ids"]
    counts = shards.manifest["languages"]["en"]["counts"]
    assert counts["lines_compared"] == len(TEXT)
    assert "lines_compared_differing" not in counts
    return shards
