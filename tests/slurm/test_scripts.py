"""The Slurm scripts without running a job: syntax, lint, arguments, and their sbatch headers."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.config import load_recipe, recipe_to_yaml
from tests.conftest import REPO
from tests.slurm.cluster import Cluster
from tests.slurm.scripts import bash, programs

BATCH_SCRIPTS = ["distill_xlmr.sh", "prepare_cc100.sh", "merge_shards.sh", "evaluate.sh", "node_check.sh"]


ALL_SCRIPTS = sorted([*(REPO / "slurm").glob("*.sh"), *(REPO / "slurm" / "lib").glob("*.sh")])


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
    """--test-only with the script's own header, except for GPUs: the test nodes have two."""
    options = ["--gpus-per-node=2", "--cpus-per-task=8"] if "gpus" in (REPO / "slurm" / script).read_text() else []
    done = cluster.attempt("sbatch", "--test-only", *options, f"slurm/{script}")
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "says"),
    [
        ("distill_xlmr.sh", ["no.yaml"], {}, "RECIPE: no.yaml not found"),
        ("distill_xlmr.sh", ["recipes/quickstart.yaml", "no.json"], {}, "DS_JSON: no.json not found"),
        ("distill_xlmr.sh", ["recipes/quickstart.yaml"], {"MAX_RESTARTS": "many"}, "MAX_RESTARTS is 'many'"),
        ("distill_xlmr.sh", ["recipes/quickstart.yaml"], {"ON_PREEMPTION": "x"}, "ON_PREEMPTION is 'x'"),
        ("distill_xlmr.sh", ["recipes/quickstart.yaml"], {}, "this job has no GPU"),
        ("distill_xlmr.sh", ["recipes/quickstart.yaml"], {"PROCESSES_PER_NODE": "0"}, "PROCESSES_PER_NODE is '0'"),
        ("distill_xlmr.sh", [], {"PYTHON": "/no/python"}, "no Python found at /no/python"),
        ("distill_xlmr.sh", [], {"SITE_ENV": "/no/site.env"}, "SITE_ENV: /no/site.env not found"),
        ("prepare_cc100.sh", [], {}, "usage: sbatch"),
        ("prepare_cc100.sh", ["no", "samples", "out"], {}, "TEXT_DIR: no not found"),
        ("prepare_cc100.sh", ["samples/cc100", "samples", "out"], {}, "submit with --array"),
        (
            "prepare_cc100.sh",
            ["samples/cc100", "samples", "o", "xx"],
            {"SLURM_ARRAY_TASK_ID": "0"},
            "LANGUAGE: no text found",
        ),
        ("merge_shards.sh", ["no"], {}, "Prepare first"),
        ("evaluate.sh", ["no"], {}, "RUN_DIR: no not found"),
        ("evaluate.sh", ["slurm"], {}, "The run is not finished"),
        ("node_check.sh", ["no.yaml"], {}, "RECIPE: no.yaml not found"),
        ("submit_all.sh", ["--recipe"], {}, "--recipe needs a value"),
        ("submit_all.sh", ["--color", "red"], {}, "unknown option --color"),
        ("submit_all.sh", ["--set", "steps=7"], {}, "put it after --"),
        ("submit_all.sh", ["--recipe", "no.yaml"], {}, "--recipe: no.yaml not found"),
        ("submit_all.sh", ["--recipe", "recipes/quickstart.yaml"], {}, "--text: (not given) not found"),
        ("submit_all.sh", ["--recipe", "recipes/quickstart.yaml", "--from", "x"], {}, "--from is 'x'"),
        ("submit_all.sh", ["--status", "no"], {}, "--status: no/jobs.tsv not found"),
    ],
)
def test_user_errors_are_one_paragraph(
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


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, Path]:
    """A recipe, and a run directory with its finished run."""
    recipe, run_dir = tmp_path / "my recipe.yaml", tmp_path / "my run"
    recipe.write_text("steps: 12\n")
    run_dir.mkdir()
    (run_dir / "DONE").write_text("done: 12 steps\n")
    (run_dir / "recipe.yaml").write_text(recipe_to_yaml(load_recipe(recipe, [])))
    return recipe, run_dir


def test_a_finished_run_is_not_trained_again(finished: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run_dir = finished
    arguments = [str(recipe), "ds_configs/zero2.json", str(run_dir)]
    done = bash("distill_xlmr.sh", *arguments, PROCESSES_PER_NODE="1", **programs(tmp_path / "bin"))
    assert done.returncode == 0, done.stderr
    assert "is finished: done: 12 steps" in done.stdout


@pytest.mark.parametrize("setting", ["steps=24", "seed=7"])
def test_training_decides_about_new_settings_of_a_finished_run(
    setting: str, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    """The ranks are started. A marker file of the earlier job does not hide their failure."""
    recipe, run_dir = finished
    environment = programs(tmp_path / "bin", srun='case $* in *torch*) echo "RANKS $*"; exit 1;; *true) ;; *) while [[ $1 == --* ]]; do shift; done; exec "$@";; esac')  # fmt: skip
    arguments = [str(recipe), "ds_configs/zero2.json", str(run_dir), "--set", setting]
    done = bash("distill_xlmr.sh", *arguments, PROCESSES_PER_NODE="1", **environment)
    assert "RANKS" in done.stdout, done.stdout + done.stderr
    assert setting in done.stdout
    assert done.returncode == 1
    assert "failed (code 1) and is not requeued" in done.stdout
    assert (run_dir / "DONE").exists(), "the marker of the twelve steps is kept"


def test_an_unreadable_recipe_is_an_error(finished: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run_dir = finished
    arguments = [str(recipe), "ds_configs/zero2.json", str(run_dir), "--set", "stops=24"]
    done = bash("distill_xlmr.sh", *arguments, PROCESSES_PER_NODE="1", **programs(tmp_path / "bin"))
    assert done.returncode == 2
    assert "did you mean `steps`" in done.stderr


@pytest.mark.parametrize("container", ["CONTAINER=(inside)", "SRUN_OPTIONS=(--container-image=x)"])
@pytest.mark.parametrize("script", ["merge_shards.sh", "evaluate.sh", "node_check.sh", "prepare_cc100.sh"])
def test_every_python_of_every_script_runs_in_the_container(script: str, container: str, tmp_path: Path) -> None:
    """Apptainer precedes the command, pyxis is an option of srun. No Python outside the container is needed."""
    site, log, run_dir = tmp_path / "site.env", tmp_path / "calls", tmp_path / "run"
    site.write_text(f"PYTHON=python-of-the-image\n{container}\n")
    run_dir.mkdir()
    (run_dir / "DONE").touch()
    (run_dir / "recipe.yaml").touch()
    (tmp_path / "shards.parts" / "sw").mkdir(parents=True)
    (tmp_path / "shards.parts" / "sw" / "manifest.json").touch()
    says = f'echo "$*" >>{shlex.quote(str(log))}; echo answer'
    environment = programs(tmp_path / "bin", srun=says, scontrol="echo here")
    arguments = {
        "merge_shards.sh": [str(tmp_path / "shards")],
        "evaluate.sh": [str(run_dir)],
        "node_check.sh": ["recipes/quickstart.yaml", str(run_dir)],
        "prepare_cc100.sh": ["samples/cc100", "samples", str(tmp_path / "shards"), "sw"],
    }[script]
    environment |= {"SITE_ENV": str(site), "PYTHON": "", "PROCESSES_PER_NODE": "1", "SLURM_ARRAY_TASK_ID": "0"}
    done = bash(script, *arguments, **environment)
    assert "not found" not in done.stderr, done.stderr
    calls = log.read_text().splitlines()
    words = "inside python-of-the-image" if "inside" in container else "--container-image=x python-of-the-image"
    starts = [call for call in calls if "python-of-the-image" in call]
    assert len(starts) >= {"merge_shards.sh": 3, "evaluate.sh": 4, "node_check.sh": 3, "prepare_cc100.sh": 1}[script]
    assert all(words in call for call in starts)


def test_two_evaluations_export_one_student(tmp_path: Path) -> None:
    """Two jobs at the same time, then a third after more training. A fake Python logs what it is called for."""
    run_dir, calls = tmp_path / "run", tmp_path / "calls"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text("teacher: some/teacher\n")
    (run_dir / "DONE").write_text("done: 12 steps\n")
    os.utime(run_dir / "DONE", (1, 1))
    python = f"""
            [[ $1 == -c ]] && exec {shlex.quote(sys.executable)} "$@"
            echo "begin $3" >>{shlex.quote(str(calls))}
            [[ $3 != export ]] || {{ mkdir "$6.tmp" && sleep 1 && touch "$6.tmp/lineage.json" && rm -rf "$6" && mv "$6.tmp" "$6"; }}
            echo "end $3" >>{shlex.quote(str(calls))}"""
    environment = programs(tmp_path / "bin", python=python) | {"PYTHON": str(tmp_path / "bin" / "python")}

    def evaluate() -> subprocess.CompletedProcess[str]:
        return bash("evaluate.sh", str(run_dir), **environment)

    with ThreadPoolExecutor() as pool:
        both = [pool.submit(evaluate) for _ in range(2)]
    assert [job.result().returncode for job in both] == [0, 0], [job.result().stderr for job in both]
    lines = calls.read_text().splitlines()
    assert lines[:2] == ["begin export", "end export"], "no job evaluates before the export is finished"
    assert [lines.count(f"begin {verb}") for verb in ("export", "evaluate", "report")] == [1, 2, 2]
    os.utime(run_dir / "DONE")
    os.utime(run_dir / "student" / "lineage.json", (1, 1))
    assert evaluate().returncode == 0
    assert calls.read_text().splitlines().count("begin export") == 2


def family_run(run_dir: Path, layers: dict[str, int]) -> None:
    """The files of a finished run with several students: name -> teacher layer."""
    for name, layer in layers.items():
        directory = run_dir / "students" / name
        directory.mkdir(parents=True)
        (directory / "recipe.yaml").write_text(f"teacher: some/teacher\nrelations: {{teacher_layer: {layer}}}\n")
        (run_dir / "checkpoints" / "step-00000012" / name).mkdir(parents=True)
    (run_dir / "DONE").write_text("done: 12 steps\n")


def calls_of_evaluation(run_dir: Path, bin_directory: Path) -> tuple[list[str], list[str]]:
    """What slurm/evaluate.sh calls of the pipeline, with `run` for the run directory, and what it prints."""
    python = """
            [[ $1 == -c ]] && exec {python} "$@"
            printf '%s|' "${{@:3}}" >>{calls}; echo >>{calls}"""
    calls = bin_directory.with_name("calls")
    text = python.format(python=shlex.quote(sys.executable), calls=shlex.quote(str(calls)))
    environment = programs(bin_directory, python=text) | {"PYTHON": str(bin_directory / "python")}
    done = bash("evaluate.sh", str(run_dir), **environment)
    assert done.returncode == 0, done.stderr
    return [text.replace(str(run_dir), "run").splitlines() for text in (calls.read_text(), done.stdout)]


def test_students_of_one_teacher_layer_are_evaluated_in_one_call(tmp_path: Path) -> None:
    family_run(tmp_path / "my run", {"6x384": 12, "large": 12})
    calls, output = calls_of_evaluation(tmp_path / "my run", tmp_path / "bin")
    assert calls == [
        "export|run|--output|run/students/6x384/student|--student|6x384|",
        "export|run|--output|run/students/large/student|--student|large|",
        "evaluate|some/teacher@12|run/students/6x384/student|run/students/large/student|--output|run/evaluation|--tasks|retrieval|",
        "report|run|",
    ]
    assert output[-1].endswith("finished: run/students/6x384/student run/students/large/student")


def test_each_teacher_layer_is_evaluated_with_its_students(tmp_path: Path) -> None:
    family_run(tmp_path / "my run", {"a": 12, "b": 9, "c": 12})
    calls, _ = calls_of_evaluation(tmp_path / "my run", tmp_path / "bin")
    assert calls[3:] == [
        "evaluate|some/teacher@9|run/students/b/student|--output|run/students/b/evaluation|--tasks|retrieval|",
        "evaluate|some/teacher@12|run/students/a/student|run/students/c/student|--output|run/students/a/evaluation|--tasks|retrieval|",
        "report|run|",
    ]


def test_students_without_a_checkpoint_are_left_out_of_an_evaluation(tmp_path: Path) -> None:
    """One of the run's first steps, one that was removed later, one without any file, and one that was added later."""
    run_dir = tmp_path / "my run"
    family_run(run_dir, {"gone": 12, "kept": 12, "never": 9})
    for step, names in ((9, ["gone", "kept"]), (12, ["kept"]), (100, ["gone.tmp"])):
        for name in names:
            (run_dir / "checkpoints" / f"step-{step:08d}" / name).mkdir(parents=True, exist_ok=True)
    for name in ("gone", "never"):
        (run_dir / "checkpoints" / "step-00000012" / name).rmdir()
    (run_dir / "checkpoints" / "step-00000100").rename(run_dir / "checkpoints" / "step-00000100.tmp")
    (run_dir / "students" / "empty").mkdir()
    family_run(run_dir, {"late": 12})
    (run_dir / "checkpoints-2").mkdir()
    (run_dir / "checkpoints-2" / "step-00000012" / "late").mkdir(parents=True)
    (run_dir / "checkpoints" / "step-00000012" / "late").rmdir()
    calls, output = calls_of_evaluation(run_dir, tmp_path / "bin")
    assert calls == [
        "export|run|--output|run/students/kept/student|--student|kept|",
        "export|run|--output|run/students/late/student|--student|late|",
        "evaluate|some/teacher@12|run/students/kept/student|run/students/late/student|--output|run/evaluation|--tasks|retrieval|",
        "report|run|",
    ]
    left_out = [line.partition("left out: ")[2] for line in output if "left out" in line]
    assert left_out[0].startswith("run/students/empty has no recipe.yaml")
    assert ["the student gone " in left_out[1], "the student never " in left_out[2]] == [True, True]


def test_a_run_of_which_no_student_is_saved_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "students" / "empty").mkdir(parents=True)
    (tmp_path / "DONE").touch()
    done = bash("evaluate.sh", str(tmp_path), **programs(tmp_path / "bin"))
    assert done.returncode == 2
    assert f"no student of {tmp_path} is in its newest checkpoint" in done.stderr


def test_merge_names_a_language_that_was_prepared_again(tmp_path: Path) -> None:
    for place, text in ((tmp_path / "s.parts" / "sw" / "sw", "new"), (tmp_path / "s" / "sw", "old")):
        place.mkdir(parents=True)
        (place / "journal.jsonl").write_text(text)
    (tmp_path / "s.parts" / "sw" / "manifest.json").touch()
    done = bash("merge_shards.sh", str(tmp_path / "s"))
    assert done.returncode == 2
    assert "sw: prepared again" in done.stderr
    fix = done.stderr.partition("rm -r ")[2].partition(" and submit")[0]
    subprocess.run(["rm", "-r", *shlex.split(fix)], check=True)
    assert bash("merge_shards.sh", str(tmp_path / "s"), **programs(tmp_path / "bin", srun="")).returncode == 0
