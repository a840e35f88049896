"""What can be said of the Slurm scripts without running a job: syntax, lint, arguments, and what sbatch makes of them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.slurm.cluster import Cluster

BATCH_SCRIPTS = ["distill_xlmr.sh", "prepare_cc100.sh", "merge_shards.sh", "evaluate.sh", "node_check.sh"]
ALL_SCRIPTS = sorted([*(REPO / "slurm").glob("*.sh"), *(REPO / "slurm" / "lib").glob("*.sh")])


def bash(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script here, in a job's environment but without Slurm."""
    job = {"SLURM_SUBMIT_DIR": str(REPO), "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "here", "SLURM_CPUS_PER_TASK": "1"}
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    return subprocess.run(
        ["bash", f"slurm/{script}", *arguments],
        cwd=REPO,
        env={**plain, **job, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("script", ALL_SCRIPTS, ids=lambda path: path.name)
def test_syntax(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if script.parent.name == "slurm":
        assert "set -euo pipefail" in script.read_text()
        assert os.access(script, os.X_OK)


def test_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "shellcheck comes with requirements-dev.txt"
    scripts = [*map(str, ALL_SCRIPTS), "slurm/site.example.env", ".ci/run"]
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", BATCH_SCRIPTS)
def test_sbatch_accepts_the_header(script: str, cluster: Cluster) -> None:
    """--test-only with the script's own header, the GPUs excepted: the pretended nodes have two."""
    options = ["--gpus-per-node=2", "--cpus-per-task=8"] if "gpus" in (REPO / "slurm" / script).read_text() else []
    done = cluster.attempt("sbatch", "--test-only", *options, f"slurm/{script}")
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "says"),
    [
        ("distill_xlmr.sh", ["no.yaml"], {}, "RECIPE: there is no no.yaml"),
        ("distill_xlmr.sh", ["recipes/quickstart.yaml", "no.json"], {}, "DS_JSON: there is no no.json"),
        ("distill_xlmr.sh", ["recipes/quickstart.yaml"], {"MAX_RESTARTS": "many"}, "MAX_RESTARTS is 'many'"),
        ("distill_xlmr.sh", ["recipes/quickstart.yaml"], {"ON_PREEMPTION": "x"}, "ON_PREEMPTION is 'x'"),
        ("distill_xlmr.sh", ["recipes/quickstart.yaml"], {}, "this job has no GPU"),
        ("distill_xlmr.sh", ["recipes/quickstart.yaml"], {"PROCESSES_PER_NODE": "0"}, "PROCESSES_PER_NODE is '0'"),
        ("distill_xlmr.sh", [], {"PYTHON": "/no/python"}, "there is no Python at /no/python"),
        ("distill_xlmr.sh", [], {"SITE_ENV": "/no/site.env"}, "SITE_ENV: there is no /no/site.env"),
        ("prepare_cc100.sh", [], {}, "usage: sbatch"),
        ("prepare_cc100.sh", ["no", "samples", "out"], {}, "TEXT_DIR: there is no no"),
        ("prepare_cc100.sh", ["samples/cc100", "samples", "out"], {}, "submit with --array"),
        ("prepare_cc100.sh", ["samples/cc100", "samples", "o", "xx"], {"SLURM_ARRAY_TASK_ID": "0"}, "LANGUAGE: there"),
        ("merge_shards.sh", ["no"], {}, "Prepare first"),
        ("evaluate.sh", ["no"], {}, "RUN_DIR: there is no no"),
        ("evaluate.sh", ["slurm"], {}, "The run is not finished"),
        ("node_check.sh", ["no.yaml"], {}, "RECIPE: there is no no.yaml"),
        ("submit_all.sh", ["--recipe"], {}, "--recipe needs a value"),
        ("submit_all.sh", ["--color", "red"], {}, "unknown option --color"),
        ("submit_all.sh", ["--recipe", "no.yaml"], {}, "--recipe: there is no no.yaml"),
        ("submit_all.sh", ["--recipe", "recipes/quickstart.yaml"], {}, "--text: there is no (not given)"),
        ("submit_all.sh", ["--recipe", "recipes/quickstart.yaml", "--from", "x"], {}, "--from is 'x'"),
        ("submit_all.sh", ["--status", "no"], {}, "--status: there is no no/jobs.tsv"),
    ],
)
def test_what_the_user_can_mend_is_said_in_one_paragraph(
    script: str, arguments: list[str], environment: dict[str, str], says: str
) -> None:
    done = bash(script, *arguments, **environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_scripts_are_submitted_from_the_repository(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(REPO / "slurm" / "distill_xlmr.sh")], capture_output=True, text=True, env={})
    assert done.returncode != 0
    assert "submit this with sbatch, from the root of the repository" in done.stderr


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    (tmp_path / "DONE").write_text("done: 12 steps\n")
    arguments = ["recipes/quickstart.yaml", "ds_configs/zero2.json", str(tmp_path)]
    done = bash("distill_xlmr.sh", *arguments, PROCESSES_PER_NODE="1")
    assert done.returncode == 0, done.stderr
    assert "is finished: done: 12 steps" in done.stdout


def test_two_evaluations_export_one_student(tmp_path: Path) -> None:
    """Both jobs at once, then a third after more training. Slurm's part is left out; Python's is to say what it was called for."""
    run_dir, calls = tmp_path / "run", tmp_path / "calls"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text("teacher: some/teacher\n")
    (run_dir / "DONE").write_text("done: 12 steps\n")
    os.utime(run_dir / "DONE", (1, 1))
    programs = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "python": f"""
            [[ $1 == -c ]] && exec {shlex.quote(sys.executable)} "$@"
            echo "begin $3" >>{shlex.quote(str(calls))}
            [[ $3 != export ]] || {{ mkdir "$6.tmp" && sleep 1 && touch "$6.tmp/lineage.json" && rm -rf "$6" && mv "$6.tmp" "$6"; }}
            echo "end $3" >>{shlex.quote(str(calls))}""",
    }
    for name, lines in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}

    def evaluate() -> subprocess.CompletedProcess[str]:
        return bash("evaluate.sh", str(run_dir), **environment)

    with ThreadPoolExecutor() as pool:
        both = [pool.submit(evaluate) for _ in range(2)]
    assert [job.result().returncode for job in both] == [0, 0], [job.result().stderr for job in both]
    lines = calls.read_text().splitlines()
    assert lines[:2] == ["begin export", "end export"], "nobody evaluates before the student is there"
    assert [lines.count(f"begin {verb}") for verb in ("export", "evaluate", "report")] == [1, 2, 2]
    os.utime(run_dir / "DONE")
    os.utime(run_dir / "student" / "lineage.json", (1, 1))
    assert evaluate().returncode == 0
    assert calls.read_text().splitlines().count("begin export") == 2


def test_dry_run_shows_every_command_and_submits_nothing(tmp_path: Path) -> None:
    """Values with spaces stay whole; there is no sbatch on this PATH."""
    text = tmp_path / "my text"
    text.mkdir()
    for name in ("de.txt.xz", "zh-Hans.txt.xz", "sw.jsonl.gz"):
        (text / name).touch()
    options = ["--text", str(text), "--tokenizer", str(tmp_path), "--shards", "my shards", "--nodes", "4"]
    options += ["--recipe", "recipes/quickstart.yaml", "--run-dir", str(tmp_path / "run"), "--chain", "2", "--dry-run"]
    done = bash("submit_all.sh", *options, "--", "--set", "steps=7")
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    scripts = [next(word for word in command if word.startswith("slurm/")) for command in commands]
    assert scripts == [
        f"slurm/{name}.sh" for name in ("prepare_cc100", "merge_shards", *["distill_xlmr"] * 2, "evaluate")
    ]
    prepare, merge, first, second, evaluate = commands
    assert prepare[-6:] == [str(text), str(tmp_path), "my shards", "de", "sw", "zh-Hans"]
    assert "--array=0-2%20" in prepare
    for command, before in ((merge, "prepare"), (first, "merge"), (second, "train"), (evaluate, "train")):
        assert f"--dependency=afterok:<{before}>" in command
        assert "--kill-on-invalid-dep=yes" in command
    assert {"--nodes=4", "--no-requeue"} <= set(first)
    assert first[-2:] == ["--set", "steps=7"]
    assert not (tmp_path / "run").exists()


def test_dry_run_from_a_later_stage() -> None:
    done = bash("submit_all.sh", "--from", "train", "--recipe", "recipes/quickstart.yaml", "--dry-run")
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(commands) == 2
    assert not any(word.startswith("--dependency") for word in commands[0])
    assert "--no-requeue" not in commands[0], "without --chain the job requeues itself"
