"""Run every command of docs/your_own_text.md, in order and unchanged, on small data in the places that the page names."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets  # noqa: F401 (here once, and not in every process that lists files)
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.__main__ import build_parser, main
from data_prep.shards import ShardSet
from tests.conftest import REPO, SAMPLES
from tests.docs.documents import FENCE, commands_of
from tests.unit.data_prep.small_hub import SmallHub

PAGE = REPO / "docs" / "your_own_text.md"
COMMIT = "c3" * 20


def texts_of(language: str) -> list[str]:
    text = lzma.open(SAMPLES / "cc100" / f"{language}.txt.xz", "rt", encoding="utf-8").read()
    return [line for line in text.splitlines() if line.strip()][:200]


def write_parquet(path: Path, texts: list[str], column: str = "text") -> None:
    path.parent.mkdir(parents=True)
    scores = [0.5 if row % 4 == 0 else 0.9 for row in range(len(texts))]
    pyarrow.parquet.write_table(pyarrow.table({column: texts, "language_score": scores}), path, row_group_size=50)


def write_folder(root: Path) -> None:
    """The folder that the page draws."""
    swahili = [json.dumps({"text": text}) for text in texts_of("sw")]
    files = {
        "en.txt.xz": lzma.compress("\n\n".join(texts_of("en")).encode()),
        "sw/part-1.jsonl.gz": gzip.compress("\n".join(swahili[::2]).encode()),
        "sw/part-2.jsonl.gz": gzip.compress("\n".join(swahili[1::2]).encode()),
        "letters/1912.txt": b"Une lettre.\n\nUne autre.\n",
        "letters/index.txt": b"1912\n",
        "README.md": b"About these texts.\n",
    }
    drawing = FENCE.findall(PAGE.read_text(encoding="utf-8"))[0][2]
    assert {line.split()[0] for line in drawing.splitlines()[1:]} == set(files), "the page draws another folder"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def write_hub(root: Path) -> None:
    lines = ["---", "configs:"]
    for config, language in {"deu_Latn": "de", "swh_Latn": "sw", "cmn_Hani": "zh-Hans", "xyz_Latn": "tr"}.items():
        write_parquet(root / "data" / config / "train" / "000_00000.parquet", texts_of(language))
        lines += [f"- config_name: {config}", "  data_files:", "  - split: train", f"    path: data/{config}/train/*"]
    (root / "README.md").write_text("\n".join([*lines, "---", ""]))


def test_every_command_of_the_page_runs(
    tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "data" / "my_text")
    write_parquet(tmp_path / "data" / "crawl" / "tr" / "0.parquet", texts_of("tr"), column="body")
    write_hub(tmp_path / "origin")
    shutil.copytree(tiny_tokenizer, tmp_path / "artifacts" / "xlmr_large")
    for name, lines in re.findall(r"^```map (\S+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S):
        (tmp_path / name).write_text(lines)
    monkeypatch.chdir(tmp_path)
    with SmallHub(
        tmp_path / "hub", "HuggingFaceFW/fineweb-2", {COMMIT: str(tmp_path / "origin")}, COMMIT
    ).running() as hub:
        hub.use_here(monkeypatch)
        for command in (each for each in commands_of(PAGE) if each.complete):
            words = [word.replace("COMMIT", COMMIT) for word in command.words]
            if words[0] == "hf":
                program = Path(sys.executable).with_name("hf")
                subprocess.run(
                    [program, *words[1:]], env={**os.environ, **hub.environment()}, check=True, capture_output=True
                )
            else:
                assert words[:3] == ["python", "-m", "data_prep"]
                workers = ["--workers", "1"] if words[3] == "prepare" else []
                assert main([*words[3:], *workers]) == 0, command.text
    outputs = {path.name: ShardSet(path) for path in sorted((tmp_path / "data").glob("*_shards"))}
    assert {name: shards.languages for name, shards in outputs.items()} == {
        "crawl_shards": ["tr"],
        "local_shards": ["sw"],
        "mapped_shards": ["de", "sw", "zh-Hans"],
        "my_shards": ["en", "fr", "sw"],
        "pinned_shards": ["sw"],
        "web_shards": ["de", "sw"],
    }
    assert outputs["web_shards"].num_documents("de") == 150  # three quarters have a score of .9
    assert outputs["crawl_shards"].num_documents("tr") == 150
    assert outputs["web_shards"].manifest["data_sets"] == {"HuggingFaceFW/fineweb-2": [COMMIT]}
    tokens = [
        outputs[name].manifest["languages"]["sw"]["tokens"]
        for name in ("local_shards", "pinned_shards", "mapped_shards")
    ]
    assert len(set(tokens)) == 1
    assert "matches no file" not in capsys.readouterr().err


def test_the_page_names_every_option() -> None:
    (verbs,) = (action for action in build_parser()._actions if action.choices and "prepare" in action.choices)
    assert isinstance(verbs.choices, dict)
    options = {option for action in verbs.choices["prepare"]._actions for option in action.option_strings} - {
        "-h",
        "--help",
    }
    table = PAGE.read_text(encoding="utf-8").split("## Every option")[1]
    assert set(re.findall(r"`(--[a-z-]+)", table)) == options
