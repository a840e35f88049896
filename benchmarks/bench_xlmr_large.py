"""Run the paper's XLM-R-large recipes end to end for two steps, with a randomly initialised teacher of that shape.

    python benchmarks/bench_xlmr_large.py [--quick] [--json FILE]        (about 9 GB of memory; --quick: one recipe)

Shapes, configs, shards in the 250 002-token vocabulary, training, checkpoint and export are the real ones. Only the
teacher's weights are random, so losses are meaningless. Prints peak memory per recipe.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import torch  # noqa: E402
from transformers import XLMRobertaConfig, XLMRobertaModel  # noqa: E402

from benchmarks.measure import arguments, publish  # noqa: E402

RECIPES = ("xlmr_large_l6_h384", "xlmr_large_l12_h384")


def make_teacher(directory: Path, tokenizer: Path) -> None:
    """Save a model of XLM-R-large's config with random weights, and the quickstart teacher's tokenizer (the same 250 002 ids)."""
    config = XLMRobertaConfig(
        vocab_size=250002,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(directory)
    for name in ("sentencepiece.bpe.model", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, directory)


def run(arguments: list[str]) -> float:
    """Run a command that must succeed. Returns the peak resident memory of all children so far, in GB."""
    subprocess.run([sys.executable, *arguments], cwd=REPO, check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def try_recipe(name: str, teacher: Path, shards: Path, directory: Path) -> dict[str, Any]:
    run_dir = directory / name
    batch = ["--set", "global_batch=4", "--set", "micro_batch_per_gpu=2", "--set", "steps=2", "--set", "heldout_rows=1"]
    where = ["--set", f"teacher={teacher}", "--set", f"data={shards}", "--set", "languages=[de, en, ru, zh-Hans]"]
    often = ["--set", "metrics.log_every=1", "--run-dir", str(run_dir)]
    train = ["pipeline/train.py", "--deepspeed", "ds_configs/zero2.json", "--recipe", f"recipes/{name}.yaml"]
    peak = run([*train, *where, *batch, *often])
    run(["-m", "pipeline", "export", str(run_dir), "--output", str(run_dir / "student")])
    config = json.loads((run_dir / "student" / "config.json").read_text())
    size = (run_dir / "student" / "model.safetensors").stat().st_size
    return {
        "recipe": name,
        "student": f"{config['num_hidden_layers']} x {config['hidden_size']}",
        "parameters (M)": round(size / 4e6, 1),
        "precision": json.loads((run_dir / "run.json").read_text())["precision"],
        "peak memory (GB)": round(peak, 1),
    }


def main() -> None:
    options = arguments(__doc__).parse_args()
    run(["-m", "demo.teacher"])
    tokenizer = REPO / "artifacts" / "teacher"
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        make_teacher(directory / "teacher", tokenizer)
        shards = directory / "shards"
        prepare = ["-m", "data_prep", "prepare", "--input", "samples/cc100", "--output", str(shards)]
        run([*prepare, "--tokenizer", str(tokenizer)])
        recipes = RECIPES[:1] if options.quick else RECIPES
        rows = [try_recipe(name, directory / "teacher", shards, directory) for name in recipes]
    header = list(rows[0])
    cells = [list(row.values()) for row in rows]
    publish("XLM-R-large-shaped teacher, random weights, two steps", header, cells, {"rows": rows}, options.json)


if __name__ == "__main__":
    main()
