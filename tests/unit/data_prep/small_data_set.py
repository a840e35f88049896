"""A small data set in the hub's layout, and what its tests share."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

from data_prep.discovery import LanguageRules, survey
from data_prep.journal import JOURNAL_NAME
from data_prep.sources import ReadOptions

CONFIGS = {"deu_Latn": "Zeile", "swe_Latn": "rad", "deu_Latn_removed": "weg"}
SMALL = ("--shard-tokens", "1200", "--block-bytes", "1500")


def write_data_set(root: Path, word: str = "") -> Path:
    """A data set with three configs, two files of eight row groups in each; mC4's way for one more config."""
    lines = ["---", "configs:"]
    for config, noun in CONFIGS.items():
        for number in range(2):
            path = root / "data" / config / "train" / f"{number:03d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            texts = [f"{noun}{word} {number} {row} {row * 7919 % 10007}\n{noun} zwei" for row in range(320)]
            not_read = [row.to_bytes(2, "big") * 200 for row in range(320)]
            scores = [row / 320 for row in range(320)]
            table = pyarrow.table({"not_read": not_read, "text": texts, "language_score": scores})
            pyarrow.parquet.write_table(table, path, row_group_size=40, compression="none")
        lines += [f"- config_name: {config}", "  data_files:", "  - split: train", f"    path: data/{config}/train/*"]
        lines += ["  - split: test", f"    path: data/{config}/train/000.parquet"]
    lines += ["- config_name: 'no'", "  data_files:", "  - split: train", "    path: multilingual/c4-no.*.json.gz"]
    (root / "multilingual").mkdir()
    for number in range(2):
        records = [json.dumps({"text": f"linje {number} {row}", "url": ""}) for row in range(50)]
        (root / "multilingual" / f"c4-no.{number}.json.gz").write_bytes(gzip.compress("\n".join(records).encode()))
    (root / "README.md").write_text("\n".join([*lines, "---", ""]))
    return root


def sources(given: str, rules: LanguageRules) -> dict[str, list[str]]:
    found = survey([given], rules, ReadOptions()).sources
    return {language: [source.name for source in some] for language, some in found.items()}


def stop_after(output: Path, language: str, num_entries: int) -> None:
    """Leave what a run leaves that was killed after some shards. The shards behind them stay, as unfinished files would."""
    journal = output / language / JOURNAL_NAME
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:num_entries]))
