"""The keys and values that an error about a recipe prints are accepted: each is applied, and the error does not come again."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.config import Recipe, load_recipe
from pipeline.errors import UserError
from pipeline.planning.meta_models import blank_models, build_encoders
from pipeline.recipe.other_names import OTHER_NAMES, advice_about
from pipeline.training.checks import check_taps, open_data
from pipeline.training.recipe_warnings import recipe_warnings
from pipeline.training.sentences import check_sentences, settings_of
from tests.conftest import REPO
from tests.unit.printed import settings_in


def lines_of(recipe: Recipe, num_ranks: int = 1) -> list[str]:
    """The errors and warnings of a run's checks that need no weights."""
    teacher = blank_models(recipe)[1]
    check_taps(recipe, teacher)
    build_encoders(recipe)
    if (found := settings_of(recipe)) is None:
        return []
    rows = recipe.micro_batch_per_gpu * num_ranks
    return check_sentences(recipe, found, rows, teacher.config.hidden_size)[1]


def error_of(recipe_file: Path, *sets: str) -> str:
    """The error of a recipe; empty where there is none."""
    try:
        lines_of(load_recipe(recipe_file, list(sets)))
    except UserError as error:
        return str(error).rpartition(f"--set {shlex.quote(sets[-1])}: ")[2]  # without the options that were given
    return ""


def numbers_in(message: str, after: str) -> list[str]:
    return re.findall(r"\d+", message.partition(after)[2])


def test_numbers_of_heads(tiny_recipe: Path) -> None:
    for key, more in (("relations.heads", []), ("relations.heads", ["student.hidden=32"]), ("student.heads", [])):
        sets = [*more, f"{key}={7 if more == [] else 24}"]
        message = error_of(tiny_recipe, *sets)
        numbers = numbers_in(message, f"`{key}` to one of: ")
        assert len(numbers) > 4, message
        for number in numbers:
            assert error_of(tiny_recipe, *sets, f"{key}={number}") == ""


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_numbers_of_layers(role: str, tiny_recipe: Path) -> None:
    message = error_of(tiny_recipe, f"relations.{role}_layer=9")
    first, last = re.findall(r"with layers (\d+) to (\d+)", message)[0]
    (key,) = re.findall(rf"Set `(relations\.{role}_layer)`", message)
    for number in (first, last):
        assert error_of(tiny_recipe, f"{key}={number}") == ""


def alternatives(message: str) -> Iterator[str]:
    """What follows `set` or `use` in a message, as settings: `--set KEY=VALUE`, or a line of a recipe in backticks."""
    yield from settings_in(message)
    advice = re.split(r"(?:[;:.,]| or) (?:set|use|Set|Use) ", message, maxsplit=1)[-1]
    for key, value in re.findall(r"`([a-z_.]+): ([a-z0-9_]+)`", advice):
        section = re.findall(rf"`(\w+)\.{key}[`:]", message) if "." not in key else []
        yield f"{section[0]}.{key}={value}" if section else f"{key}={value}"


@pytest.mark.parametrize(
    ("sets", "number"),
    [
        (["positions=restart"], 1),
        (["relations.tail=mse"], 2),
        (["relations.after_rotary=true"], 1),
        (["student.freeze=[embeddings]", "student.init=random"], 2),
        (["student.family=modernbert", "student.init=layers"], 1),
        (["student.init=project", "student.hidden=96"], 0),
        (["student.init=layers", "student.init_layers=[1, 2, 3]"], 1),
        (["relations.tail=pooled", "relations.pooled_distance=similarity", "micro_batch_per_gpu=1"], 1),
    ],
    ids=lambda value: str(value)[:50],
)
def test_lines_in_backticks(sets: list[str], number: int, tiny_recipe: Path) -> None:
    message = error_of(tiny_recipe, *sets)
    settings = list(alternatives(message))
    assert len(settings) >= number, message
    for setting in settings:
        assert error_of(tiny_recipe, *sets, setting) == "", setting


def test_layers_of_an_encoder_that_is_not_the_teacher(tiny_recipe: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    sets = [f"student.init={shutil.copytree(tiny_teacher, tmp_path / 'start')}", "student.init_layers=[1, 2]"]
    settings = list(alternatives(error_of(tiny_recipe, *sets)))
    assert settings == ["student.init_layers=null", "student.init=layers"]
    for setting in settings:
        load_recipe(tiny_recipe, [*sets, setting])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_what_one_sentence_vector_is_of(pooling: str, tiny_recipe: Path) -> None:
    sets = ["relations.tail=pooled", f"relations.pooling={pooling}"]
    seen = []
    while warnings := [line for line in lines_of(load_recipe(tiny_recipe, sets)) if "--set" in line]:
        seen += warnings
        sets += settings_in(warnings[0])
        assert len(seen) < 3
    assert len(seen) == (2 if pooling == "cls" else 1)


LIMITED = [
    "steps=0", "global_batch=0", "micro_batch_per_gpu=0", "seq_len=2000000", "heldout_rows=0", "seed=-1", "save_every=0",
    "eval_every=0", "alpha=3", "relations.heads=0", "relations.heads=70000", "student.layers=0", "student.ffn=0",
    "student.dropout=2", "checkpoint.keep=0", "metrics.log_every=0", "relations.tail_weight=-1",
]  # fmt: skip


@pytest.mark.parametrize("wrong", LIMITED)
def test_both_limits_of_a_number_are_accepted(wrong: str, tiny_recipe: Path) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(tiny_recipe, [wrong])
    limits = re.findall(r"must be between (\S+)(?: \([^)]*\))? and (\S+)", str(error.value))
    assert limits, error.value
    for limit in limits[0]:
        load_recipe(tiny_recipe, [f"{wrong.partition('=')[0]}={limit}"])


@pytest.mark.parametrize("value", ["a #b", "it's #1", 'say "hi" # twice', "C:\\new #2"])
def test_a_value_that_yaml_cuts_off(value: str, tiny_recipe: Path) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(tiny_recipe, [f"teacher={value}"])
    (setting,) = settings_in(str(error.value).partition("quote it: ")[2])
    assert load_recipe(tiny_recipe, [setting]).teacher == value


def test_the_example_of_students(tiny_recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(tiny_recipe, ["students=[]"])
    (line,) = re.findall(r"like `(.*)`", str(error.value))
    path = tmp_path / "students.yaml"
    path.write_text(tiny_recipe.read_text() + line + "\n")
    assert list(load_recipe(path, []).members()) == list(yaml.safe_load(line)["students"])


def test_files_and_options_of_advice_exist() -> None:
    advice = " ".join(filter(None, (advice_about(name) for name in ("bf16", "output_dir", "resume", "num_gpus"))))
    named = re.findall(r"(?:ds_configs|slurm)/[\w.]+", advice)
    assert len(named) == 2
    assert all((REPO / name).is_file() for name in named)
    assert "--run-dir" in advice
    assert all(advice_about(names.split()[0]) == f"here it is `{key}`" for key, names in OTHER_NAMES.items())


@pytest.mark.parametrize(
    "sets",
    [
        ["optimizer.warmup_steps=50", "steps=50"],
        ["steps=2000", "save_every=5000"],
        ["steps=40000"],
        ["language_weights={hi: 1, sw: 1, he: 1, tr: 0.001}"],
    ],
    ids=str,
)
def test_the_setting_in_a_warning_removes_it(sets: list[str], tiny_recipe: Path) -> None:
    def warnings(*more: str) -> list[str]:
        recipe = load_recipe(tiny_recipe, ["heldout_rows=1", *sets, *more])
        return [line for line in recipe_warnings(recipe, open_data(recipe)) if "--set" in line]

    before = warnings()
    assert before
    for line in before:
        settings = settings_in(line)
        more = ["language_weights=null"] if settings[0].startswith("languages=") else []
        start = line.split(" ")[:3]
        assert not [after for after in warnings(*settings, *more) if after.split(" ")[1:3] == start[1:]], settings


def test_too_many_languages_for_the_rows_of_a_run(tiny_recipe: Path) -> None:
    """With one row for four languages none can be named; with three rows, the largest ones are."""
    for steps, is_named in ((1, False), (3, True)):
        recipe = load_recipe(tiny_recipe, ["alpha=1", f"steps={steps}", "global_batch=1", "micro_batch_per_gpu=1"])
        (line,) = [line for line in recipe_warnings(recipe, open_data(recipe)) if "may not occur" in line]
        assert bool(settings_in(line)) == is_named
        for setting in settings_in(line):
            named = setting.removeprefix("languages=[").rstrip("]").split(",")
            assert not set(named) & set(re.findall(r"[(,] ?(\w+) [\d.e-]+ of the rows", line))
