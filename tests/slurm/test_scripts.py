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

from data_prep.languages import CC100
from data_prep.sources import kind_of
from data_prep.unpack import PACKINGS
from pipeline.config import load_recipe, recipe_to_yaml
from tests.conftest import REPO
from tests.slurm.cluster import Cluster

BATCH_SCRIPTS = ["distill_xlmr.sh", "prepare_cc100.sh", "merge_shards.sh", "evaluate.sh", "node_check.sh"]
ALL_SCRIPTS = sorted([*(REPO / "slurm").glob("*.sh"), *(REPO / "slurm" / "lib").glob("*.sh")])


def bash(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script here, in a job's environment but without Slurm."""
    job = {"SLURM_SUBMIT_DIR": str(REPO), "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "here", "SLURM_CPUS_PER_TASK": "1"}
    job["SLURM_JOB_NUM_NODES"] = "1"
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
        (
            "prepare_cc100.sh",
            ["samples/cc100", "samples", "o", "xx"],
            {"SLURM_ARRAY_TASK_ID": "0"},
            "LANGUAGE: there is no text",
        ),
        ("merge_shards.sh", ["no"], {}, "Prepare first"),
        ("evaluate.sh", ["no"], {}, "RUN_DIR: there is no no"),
        ("evaluate.sh", ["slurm"], {}, "The run is not finished"),
        ("node_check.sh", ["no.yaml"], {}, "RECIPE: there is no no.yaml"),
        ("submit_all.sh", ["--recipe"], {}, "--recipe needs a value"),
        ("submit_all.sh", ["--color", "red"], {}, "unknown option --color"),
        ("submit_all.sh", ["--set", "steps=7"], {}, "put it behind --"),
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


def programs(directory: Path, **lines: str) -> dict[str, str]:
    """An environment whose PATH begins with bash programs of these names; srun is there, and only starts its command."""
    directory.mkdir()
    for name, text in {"srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"', "scontrol": "", **lines}.items():
        (directory / name).write_text(f"#!/bin/bash\n{text}\n")
        (directory / name).chmod(0o755)
    return {"PATH": f"{directory}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, Path]:
    """A recipe, and a run directory where it has been trained to its last step."""
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
def test_a_finished_run_that_is_asked_for_more_is_trainings_to_judge(
    setting: str, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    """The ranks are started; a marker of the earlier job does not make a success of their failure."""
    recipe, run_dir = finished
    environment = programs(tmp_path / "bin", srun='case $* in *torch*) echo "RANKS $*"; exit 1;; *true) ;; *) while [[ $1 == --* ]]; do shift; done; exec "$@";; esac')  # fmt: skip
    arguments = [str(recipe), "ds_configs/zero2.json", str(run_dir), "--set", setting]
    done = bash("distill_xlmr.sh", *arguments, PROCESSES_PER_NODE="1", **environment)
    assert "RANKS" in done.stdout, done.stdout + done.stderr
    assert setting in done.stdout
    assert done.returncode == 1
    assert "failed (code 1) and is not requeued" in done.stdout
    assert (run_dir / "DONE").exists(), "the twelve steps are still there"


def test_a_recipe_that_cannot_be_read_is_no_finished_run(finished: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run_dir = finished
    arguments = [str(recipe), "ds_configs/zero2.json", str(run_dir), "--set", "stops=24"]
    done = bash("distill_xlmr.sh", *arguments, PROCESSES_PER_NODE="1", **programs(tmp_path / "bin"))
    assert done.returncode == 2
    assert "did you mean `steps`" in done.stderr


@pytest.mark.parametrize("container", ["CONTAINER=(inside)", "SRUN_OPTIONS=(--container-image=x)"])
@pytest.mark.parametrize("script", ["merge_shards.sh", "evaluate.sh", "node_check.sh", "prepare_cc100.sh"])
def test_every_python_of_every_script_runs_in_the_container(script: str, container: str, tmp_path: Path) -> None:
    """Apptainer comes before the command, pyxis among srun's options; the Python outside must not be needed at all."""
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
    """Both jobs at once, then a third after more training. Slurm's part is left out; Python's is to say what it was called for."""
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


@pytest.fixture
def mixed_text(tmp_path: Path) -> Path:
    """Texts of four languages, one in a directory, and what usually lies beside them."""
    text = tmp_path / "my text"
    (text / "sw").mkdir(parents=True)
    (text / "empty").mkdir()
    for name in (
        "de.txt.xz",
        "zh-Hans.jsonl.gz",
        "no.parquet",
        "no.2.txt",
        "sw/part-1.txt",
        "README.txt",
        "SHA256SUMS",
    ):
        (text / name).touch()
    for name in ("md5sums.txt", "index.html", ".de.txt", "en.txt.xz.md5", "LICENSE", "gsw.txt"):
        (text / name).touch()
    return text


def submit_all(*options: str, cwd: Path = REPO, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(REPO / "slurm" / "submit_all.sh"), "--recipe", "recipes/quickstart.yaml", *options]
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def commands_of(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_readme_and_checksums_are_no_languages(mixed_text: Path, tmp_path: Path) -> None:
    options = ["--text", str(mixed_text), "--tokenizer", str(tmp_path), "--shards", "s", "--dry-run"]
    done = submit_all(*options)
    prepare = commands_of(done)[0]
    assert prepare[-4:] == ["de", "no", "sw", "zh-Hans"]
    assert "--array=0-3%20" in prepare
    for name in (
        "README.txt",
        "SHA256SUMS",
        "md5sums.txt",
        "index.html",
        ".de.txt",
        "en.txt.xz.md5",
        "gsw.txt",
        "empty",
    ):
        assert f"'{name}'" in done.stderr
    for spelled in ("gsw de", "gsw,de", " gsw  de,gsw "):
        assert commands_of(submit_all(*options, "--languages", spelled))[0][-3:] == ["s", "gsw", "de"]
    assert "--languages is empty" in submit_all(*options, "--languages", " ").stderr
    refused = submit_all(*options, "--languages", "de en")
    assert refused.returncode == 2
    assert "no text of 'en'" in refused.stderr
    assert "de no sw zh-Hans" in refused.stderr


def test_a_task_reads_the_texts_of_its_language_alone(mixed_text: Path, tmp_path: Path) -> None:
    environment = programs(tmp_path / "bin", srun='printf "%s|" "$@"')
    for number, expected in enumerate(["de.txt.xz", "no.2.txt|{}/no.parquet", "sw", "zh-Hans.jsonl.gz"]):
        arguments = [str(mixed_text), "samples", str(tmp_path / "s")]
        done = bash("prepare_cc100.sh", *arguments, SLURM_ARRAY_TASK_ID=str(number), **environment)
        assert f"--input|{mixed_text}/{expected.format(mixed_text)}|--language|" in done.stdout, (
            done.stdout + done.stderr
        )


def test_the_scripts_know_what_data_prep_knows() -> None:
    script = 'source slurm/lib/stages.sh; known_languages; for name in "$@"; do is_text "x$name" && echo "$name"; done'
    kinds = (".txt", ".jsonl", ".ndjson", ".json", ".parquet", ".TXT", ".md5", ".html", ".tok", ".csv", ".md")
    endings = [kind + packing for kind in kinds for packing in (*PACKINGS, ".XZ", ".md5")]
    done = subprocess.run(["bash", "-c", script, "bash", *endings], cwd=REPO, capture_output=True, text=True)
    read = {ending for ending in endings if kind_of("x" + ending)}
    assert set(done.stdout.split()) == {*CC100, *read}, "slurm/lib/stages.sh has another rule than data_prep"


def test_training_reads_the_shards_that_are_prepared(tmp_path: Path) -> None:
    def data_of(*options: str, shards: str = "my shards") -> list[str]:
        done = submit_all("--from", "train", "--shards", shards, "--dry-run", *options)
        return [word for word in commands_of(done)[0] if word.startswith("data=")]

    assert data_of() == ["data=my shards"]
    assert data_of(shards="odd: #1's") == ["data='odd: #1''s'"]
    for setting in data_of(shards="odd: #1's"):
        assert load_recipe(REPO / "recipes" / "quickstart.yaml", [setting]).data == "odd: #1's"
    assert data_of("--", "--set", f"data={REPO}/my shards") == ["data=my shards", f"data={REPO}/my shards"]
    said = submit_all("--from", "train", "--shards", "elsewhere", "--dry-run").stderr
    assert "training reads elsewhere (--shards) instead of artifacts/shards" in said
    for words in (["--set", "data=other"], ["--set=data=other"]):
        refused = submit_all("--from", "train", "--shards", "s", "--dry-run", "--", *words)
        assert refused.returncode == 2
        assert "--shards is s, and --set data=other would" in refused.stderr


def test_paths_mean_the_directory_where_the_command_was_given(mixed_text: Path, tmp_path: Path) -> None:
    options = ["--text", "my text", "--tokenizer", ".", "--shards=out", "--run-dir", "50%", "--dry-run"]
    prepare, merge, train, _ = commands_of(submit_all(*options, cwd=tmp_path))
    assert prepare[7:10] == [str(mixed_text), str(tmp_path), f"{tmp_path}/out"]
    assert merge[-5] == f"{tmp_path}/out"
    assert f"--output={tmp_path}/50%%/logs/train-%j.log" in train, "sbatch replaces what follows a lone %"
    assert train[-4:] == ["ds_configs/zero2.json", f"{tmp_path}/50%", "--set", f"data={tmp_path}/out"]
    assert "recipes/quickstart.yaml" in train, "what only the repository has is found there"


def test_job_names_begin_with_the_runs(tmp_path: Path) -> None:
    done = submit_all("--from", "train", "--run-dir", str(tmp_path / "xlmr-try2"), "--dry-run")
    names = [word for command in commands_of(done) for word in command if word.startswith("--job-name=")]
    assert names == ["--job-name=xlmr-try2-train", "--job-name=xlmr-try2-evaluate"]


def test_arguments_of_the_evaluation_keep_their_quotes() -> None:
    done = submit_all(
        "--from", "evaluate", "--evaluate", "--set 'retrieval.pairs=/my dir' --tasks retrieval", "--dry-run"
    )
    assert commands_of(done)[0][-4:] == ["--set", "retrieval.pairs=/my dir", "--tasks", "retrieval"]


def test_a_run_with_jobs_in_the_queue_is_not_submitted_again(tmp_path: Path) -> None:
    (tmp_path / "jobs.tsv").write_text("prepare\t11\tx\ntrain\t12\tx\n")
    environment = programs(tmp_path / "bin", squeue="[[ $* == *=12* ]] && echo PENDING", sbatch="echo 13")
    done = submit_all("--from", "train", "--run-dir", str(tmp_path), **environment)
    assert done.returncode == 2
    assert "train 12 (PENDING)" in done.stderr
    assert "scancel 12" in done.stderr
    assert "prepare 11" not in done.stderr
    environment["PATH"] = environment["PATH"].replace(str(tmp_path / "bin"), str(programs(tmp_path / "new", sbatch="echo 13", squeue="")["PATH"].split(os.pathsep)[0]))  # fmt: skip
    assert submit_all("--from", "train", "--run-dir", str(tmp_path), **environment).returncode == 0


def test_more_languages_than_an_array_can_have(mixed_text: Path, tmp_path: Path) -> None:
    environment = programs(tmp_path / "bin", scontrol="echo 'MaxArraySize            = 3'")
    options = ["--text", str(mixed_text), "--tokenizer", str(tmp_path), "--shards", "s", "--dry-run"]
    done = submit_all(*options, **environment)
    assert done.returncode == 2
    assert "at most 3 tasks (MaxArraySize)" in done.stderr


def test_status_shows_how_the_log_of_a_failed_job_ends(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "jobs.tsv").write_text("prepare\t7\tx\ntrain\t8\tx\nevaluate\t9\tx\n")
    (tmp_path / "logs" / "prepare-7_0.log").write_text("working\n[2026-11-27 00:00:00] finished: de\n")
    (tmp_path / "logs" / "prepare-7_1.log").write_text(
        "error: sw.txt.xz is cut off\n" + "noise\n" * 50 + "slurmstepd: oom-kill\n"
    )
    (tmp_path / "logs" / "train-8.log").write_text("Traceback\nMemoryError\n")
    states = "case $* in *7) echo JobState=FAILED; echo JobState=COMPLETED;; *8) echo JobState=OUT_OF_MEMORY;; *) echo JobState=FAILED;; esac"
    done = submit_all("--status", str(tmp_path), **programs(tmp_path / "bin", scontrol=states))
    assert done.returncode == 0, done.stderr
    for words in (
        "slurmstepd: oom-kill",
        "above: error: sw.txt.xz is cut off",
        "MemoryError",
        "no log",
        "scontrol show job 9",
    ):
        assert words in done.stdout, done.stdout
    assert "finished: de" not in done.stdout, "that task is well"


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
