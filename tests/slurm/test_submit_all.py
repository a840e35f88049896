"""`submit_all.sh`: the jobs that it submits for languages, shards and a run, and the output of --status."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from data_prep.command_line import installed_program
from data_prep.languages import CC100
from data_prep.sources import kind_of
from data_prep.unpack import PACKINGS
from pipeline.config import load_recipe
from tests.conftest import REPO
from tests.slurm.scripts import bash, commands_of, programs, submit_all


def test_dry_run_shows_every_command_and_submits_nothing(tmp_path: Path) -> None:
    """Values may contain spaces. There is no sbatch on this PATH."""
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


def test_an_option_of_training_goes_where_the_message_says() -> None:
    start = ["--from", "train", "--dry-run"]
    done = submit_all(*start, "--set", "steps=7")
    assert done.returncode == 2
    (words,) = re.findall(r"at the end \((-- .*?)\)", done.stderr)
    train, _ = commands_of(submit_all(*start, *shlex.split(words)))
    assert train[-2:] == ["--set", "steps=7"]


def test_the_tokenizer_that_is_missing_is_downloaded_by_a_command_of_the_hub(tmp_path: Path) -> None:
    start = ["--text", "samples/cc100", "--shards", str(tmp_path / "shards"), "--dry-run", "--tokenizer"]
    done = submit_all(*start, "some/it's model")
    program, *words = shlex.split(done.stderr[done.stderr.index("hf download") :])
    assert words[:2] == ["download", "some/it's model"]
    known = subprocess.run([installed_program(program), "download", "--help"], capture_output=True, text=True).stdout
    assert all(word in known for word in words if word.startswith("--"))
    commands_of(submit_all(*start, str(tmp_path)))  # DIRECTORY, in which the download is


@pytest.fixture
def mixed_text(tmp_path: Path) -> Path:
    """Texts of four languages, one in a directory, and other files that such directories usually hold."""
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


def test_readme_and_checksums_are_not_languages(mixed_text: Path, tmp_path: Path) -> None:
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
    rejected = submit_all(*options, "--languages", "de en")
    assert rejected.returncode == 2
    assert "no text of 'en'" in rejected.stderr
    assert "de no sw zh-Hans" in rejected.stderr


def test_a_task_reads_only_the_texts_of_its_language(mixed_text: Path, tmp_path: Path) -> None:
    environment = programs(tmp_path / "bin", srun='printf "%s|" "$@"')
    for number, expected in enumerate(["de.txt.xz", "no.2.txt|{}/no.parquet", "sw", "zh-Hans.jsonl.gz"]):
        arguments = [str(mixed_text), "samples", str(tmp_path / "s")]
        done = bash("prepare_cc100.sh", *arguments, SLURM_ARRAY_TASK_ID=str(number), **environment)
        assert f"--input|{mixed_text}/{expected.format(mixed_text)}|--language|" in done.stdout, (
            done.stdout + done.stderr
        )


def test_languages_and_file_endings_are_those_of_data_prep() -> None:
    script = 'source slurm/lib/stages.sh; known_languages; for name in "$@"; do is_text "x$name" && echo "$name"; done'
    kinds = (".txt", ".jsonl", ".ndjson", ".json", ".parquet", ".TXT", ".md5", ".html", ".tok", ".csv", ".md")
    endings = [kind + packing for kind in kinds for packing in (*PACKINGS, ".XZ", ".md5")]
    done = subprocess.run(["bash", "-c", script, "bash", *endings], cwd=REPO, capture_output=True, text=True)
    read = {ending for ending in endings if kind_of("x" + ending)}
    assert set(done.stdout.split()) == {*CC100, *read}, "slurm/lib/stages.sh and data_prep differ"


def test_training_reads_the_prepared_shards(tmp_path: Path) -> None:
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
        rejected = submit_all("--from", "train", "--shards", "s", "--dry-run", "--", *words)
        assert rejected.returncode == 2
        assert "--shards is s, and --set data=other would" in rejected.stderr


def test_paths_are_relative_to_the_directory_of_the_caller(mixed_text: Path, tmp_path: Path) -> None:
    options = ["--text", "my text", "--tokenizer", ".", "--shards=out", "--run-dir", "50%", "--dry-run"]
    prepare, merge, train, _ = commands_of(submit_all(*options, cwd=tmp_path))
    assert prepare[7:10] == [str(mixed_text), str(tmp_path), f"{tmp_path}/out"]
    assert merge[-5] == f"{tmp_path}/out"
    assert f"--output={tmp_path}/50%%/logs/train-%j.log" in train, "sbatch replaces patterns after a single %"
    assert train[-4:] == ["ds_configs/zero2.json", f"{tmp_path}/50%", "--set", f"data={tmp_path}/out"]
    assert "recipes/quickstart.yaml" in train, "a file of the repository is found there"


def test_job_names_begin_with_the_name_of_the_run(tmp_path: Path) -> None:
    done = submit_all("--from", "train", "--run-dir", str(tmp_path / "xlmr-try2"), "--dry-run")
    names = [word for command in commands_of(done) for word in command if word.startswith("--job-name=")]
    assert names == ["--job-name=xlmr-try2-train", "--job-name=xlmr-try2-evaluate"]


def test_quotes_in_evaluation_arguments_are_parsed() -> None:
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
    assert "finished: de" not in done.stdout, "that task has succeeded"
