"""Reads recipes: YAML text and `--set` overrides in, a `Recipe` dataclass out.

Precedence: defaults < recipe file < `--set a.b=c`. Each section's dataclass is in the module that it configures; this
module composes them. An unknown key, a wrong type or an impossible value raises a `UserError` that names the file, the
key and the nearest valid key.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
import shlex
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from data_prep.command_line import module_command
from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.models.student import StudentConfig
from pipeline.distillation.models.teacher import TeacherConfig
from pipeline.errors import UserError, did_you_mean
from pipeline.recipe.other_names import advice_about
from pipeline.recipe.ranges import LARGEST_BATCH, LARGEST_INT, LARGEST_WEIGHT, LONGEST_ROW, check_ranges
from pipeline.recipe.text import Plain, apply_override, parse, read_yaml, shown
from pipeline.runtime.anomalies import GuardConfig
from pipeline.runtime.checkpoint import CheckpointConfig
from pipeline.runtime.evaluations import StopConfig
from pipeline.runtime.metrics import MetricsConfig
from pipeline.runtime.optimizer import OptimizerConfig

# Sections that earlier recipes had and that only evaluation reads now. They stay valid, so no recipe has to be edited.
EVALUATION_SECTIONS = ("retrieval",)
# What may differ between the students of one run. Teacher, text, rows and number of steps are the same for all.
PER_STUDENT = {"student": StudentConfig, "relations": RelationsConfig, "optimizer": OptimizerConfig}
_STUDENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]{0,63}")
_SHORT = reprlib.Repr()  # a message shows the start of a value; nested YAML aliases could expand to terabytes
_SHORT.maxlevel = 2
_TYPE_NAMES: dict[Any, str] = {str: "text", int: "int", float: "a finite number", bool: "true or false"}
_NO_LIMIT = ("optimizer.gradient_clipping", "guard.spike_sigmas")  # .inf turns these off
_YAML_1_1_BOOLEANS = {"yes": True, "on": True, "no": False, "off": False}  # accepted where a key is true or false


@dataclass
class Recipe:
    """One distillation run. Top-level keys are those that change most; each section configures one module."""

    teacher: str = "artifacts/teacher"  # HF directory or hub name
    teacher_options: TeacherConfig = field(default_factory=TeacherConfig)
    vocabulary: str | None = None  # output of `data_prep trim-vocab`; both models are cut to it, shards made with it
    data: str = "artifacts/shards"  # output directory of `python -m data_prep prepare`
    steps: int = 100  # optimizer steps, each over one global batch
    global_batch: int = 256  # rows per optimizer step, over all ranks and micro-batches
    micro_batch_per_gpu: int = 32  # rows per forward and backward on one rank
    seq_len: int = 512  # tokens per row, <s> and </s> included
    documents: Literal["joined", "separate"] = "joined"  # separate: attention and relations end where a document does
    positions: Literal["continue", "restart"] = "continue"  # along the row, or from the first in each separate document
    alpha: float = 0.3  # language share ~ (share of sampling_unit) ** alpha
    sampling_unit: Literal["tokens", "documents", "bytes"] = "tokens"  # what the shares are counted in
    language_weights: dict[str, float] | None = None  # explicit shares instead of alpha's
    max_epochs: float | None = None  # cap on how often a language's rows are seen, spread over all steps
    languages: list[str] | None = None  # None: every language of the shards
    heldout_rows: int = 16  # rows per language that are never trained on (at most a tenth of the language)
    seed: int = 0  # of the student's random start, the order of rows, and dropout
    deterministic: bool = True  # on a GPU: kernels that add in a fixed order, so a resumed run is equal bit for bit
    relations: RelationsConfig = field(default_factory=RelationsConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    students: dict[str, dict] | None = None  # name: what differs in student, relations, optimizer; one teacher for all
    save_every: int = 1000  # steps between checkpoints; the last step is always saved
    eval_every: int = 1000  # steps between held-out evaluations; the last step is always evaluated
    stop_when: StopConfig = field(default_factory=StopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        if self.seq_len < 3:
            raise UserError(f"seq_len is {self.seq_len}; a row is <s>, at least one token and </s>, so at least 3")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha is {self.alpha}; it must be between 0 (equal shares) and 1 (natural shares)")
        check_ranges(
            self,
            "",
            {
                "steps": (1, 10**12),
                "global_batch": (1, LARGEST_BATCH),
                "micro_batch_per_gpu": (1, LARGEST_BATCH),
                "seq_len": (3, LONGEST_ROW),
                "language_weights": (0, LARGEST_WEIGHT),
                "max_epochs": (0, LARGEST_WEIGHT),
                "heldout_rows": (1, 10**9),
                "seed": (0, LARGEST_INT),
                "save_every": (1, LARGEST_INT),
                "eval_every": (1, LARGEST_INT),
            },
        )
        if self.positions == "restart" and self.documents == "joined":
            raise UserError(
                "positions is restart, which separate documents have: tokens that attend across documents must have different "
                "positions. Set documents: separate (--set documents=separate), or positions: continue"
            )
        if self.languages == []:
            raise UserError(
                "languages is an empty list; name some, or leave the key out for every language of the shards"
            )

    @property
    def tokenizer(self) -> str:
        """Directory or hub name of the tokenizer that the shards and the student use."""
        return self.vocabulary or self.teacher

    def members(self) -> dict[str, Recipe]:
        """Name -> the recipe with which that student would be trained alone. Without `students`: "" -> this recipe."""
        if self.students is None:
            return {"": self}
        return {name: self._of_student(changes) for name, changes in self.students.items()}

    def _of_student(self, changes: dict[str, dict[str, Any]]) -> Recipe:
        sections = {
            section: build_section(cls, {**as_tree(getattr(self, section)), **changes.get(section, {})}, section)
            for section, cls in PER_STUDENT.items()
        }
        return dataclasses.replace(self, students=None, **sections)


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Read a recipe and apply `--set key=value` overrides in order. Raises `UserError` with file and key."""
    tree = _recipe_tree(path, overrides)
    try:
        recipe = build_recipe(tree)
    except UserError as error:
        where = f"{path}" + "".join(f" --set {shown(shlex.quote(override))}" for override in overrides)
        raise UserError(f"{where}: {error}") from None
    return recipe


def unused_sections_warning(path: Path, overrides: list[str]) -> str | None:
    """The text of a warning if the recipe or an override has settings that training does not use, else None."""
    found = [name for name in EVALUATION_SECTIONS if name in _recipe_tree(path, overrides)]
    if not found:
        return None
    return (
        f"training does not use `{found[0]}` of the recipe or of --set. `{module_command('demo')}` reads it; for evaluation give it "
        f"to `{module_command('pipeline', 'evaluate')}` (--set {found[0]}.KEY=VALUE)"
    )


def _recipe_tree(path: Path, overrides: list[str]) -> dict[str, Any]:
    tree = read_yaml(path)
    for override in overrides:
        apply_override(tree, override)
    return tree


def without_evaluation(tree: Any) -> Any:
    """A recipe's tree without the sections of `EVALUATION_SECTIONS`."""
    if not isinstance(tree, dict):
        return tree
    return {key: value for key, value in tree.items() if key not in EVALUATION_SECTIONS}


def tree_of_recipe(text: str, where: str) -> dict[str, Any]:
    """The plain tree of the `recipe.yaml` in a run directory, checked as a recipe is; `where` names the file in messages."""
    try:
        return as_tree(build_recipe(parse(text)))
    except ValueError as error:
        raise UserError(f"{where} is not a recipe of this version: {error}") from None


def build_recipe(tree: Any) -> Recipe:
    """A recipe from what YAML gave for it. Raises `UserError`: unknown key, wrong type or impossible value."""
    tree = without_evaluation(tree)
    students = tree.pop("students", None) if isinstance(tree, dict) else None
    recipe: Recipe = build_section(Recipe, tree, "")
    if students is not None and not (isinstance(students, Plain) and students.value is None):
        recipe.students = _differences_of_students(recipe, students)
    return recipe


def _differences_of_students(recipe: Recipe, students: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """Name -> section -> the keys that are given for this student, with the types of the section."""
    if not isinstance(students, dict) or not students:
        raise UserError(
            "`students` must map at least one name to what differs, like `students: {small: {student: {layers: 3}}}`"
        )
    typed: dict[str, dict[str, dict[str, Any]]] = {}
    for name, changes in students.items():
        _check_student_name(str(name), typed)
        is_empty = changes is None or (isinstance(changes, Plain) and changes.value is None)
        try:
            typed[str(name)] = {} if is_empty else _typed_differences(recipe, changes)
        except UserError as error:
            raise UserError(f"students.{name}: {error}") from None
    return typed


def _typed_differences(recipe: Recipe, changes: Any) -> dict[str, dict[str, Any]]:
    typed = {}
    if not isinstance(changes, dict):
        raise UserError(f"must be a section with keys, not {_SHORT.repr(changes)}")
    for section, given in changes.items():
        cls = PER_STUDENT.get(section)
        if cls is None:
            known = {f.name for f in dataclasses.fields(Recipe)}
            problem = "cannot differ between the students of a run" if section in known else "is no key of a student"
            raise UserError(f"`{_SHORT.repr(str(section))[1:-1]}` {problem}; what can differ: {', '.join(PER_STUDENT)}")
        if not isinstance(given, dict):
            raise UserError(f"`{section}` must be a section with keys, not {_SHORT.repr(given)}")
        built = as_tree(build_section(cls, {**as_tree(getattr(recipe, section)), **given}, section))
        typed[str(section)] = {str(key): built[key] for key in given}
    if typed.get("relations", {}).get("after_rotary", recipe.relations.after_rotary) != recipe.relations.after_rotary:
        raise UserError(
            "`relations.after_rotary` cannot differ between the students of a run: the teacher is read once"
        )
    return typed


def _check_student_name(name: str, earlier: Iterable[str]) -> None:
    """Names are directories of the run, also where case makes no difference, and parts of the keys of --set."""
    if not _STUDENT_NAME.fullmatch(name):
        raise UserError(
            f"`students` names {_SHORT.repr(name)}, which cannot name files: use letters, digits, _, + and -, at most 64, "
            "with a letter or digit first"
        )
    if twin := next((other for other in earlier if other.lower() == name.lower()), None):
        raise UserError(f"`students` names {twin} and {name}, which are one directory on some file systems; rename one")


def build_section(cls: type, tree: Any, where: str) -> Any:
    """Build a dataclass from a mapping.

    Args:
        cls: the dataclass
        tree: what YAML gave for it
        where: dotted path of the section, for messages; empty for the top level

    Raises:
        UserError: unknown key, wrong type or impossible value
    """
    if not isinstance(tree, dict):
        raise UserError(f"`{where}` must be a section with keys, not {_SHORT.repr(tree)}")
    names = [f.name for f in dataclasses.fields(cls)]
    for key in tree:
        if key not in names:
            raise UserError(f"unknown key `{_join(where, str(key))}`; {_instead(str(key), where, cls)}")
    hints = typing.get_type_hints(cls)
    values = {str(key): convert(hints[key], value, _join(where, key)) for key, value in tree.items()}
    return cls(**values)


def _instead(key: str, where: str, cls: type) -> str:
    """What to write for an unknown key: the same name in another section, what other projects call so, or the nearest name."""
    names = [f.name for f in dataclasses.fields(cls)]
    if cls is Recipe or where.split(".")[0] in Recipe.__dataclass_fields__:
        elsewhere = [f"`{dotted}`" for dotted in _dotted_keys(Recipe, "") if dotted.rpartition(".")[2] == key]
        if elsewhere:
            return f"did you mean {' or '.join(elsewhere)}?"
        if advice := advice_about(key):
            return advice
    return did_you_mean(key, names)


def _dotted_keys(cls: type, prefix: str) -> list[str]:
    """The keys of a section and of the sections in it."""
    hints, keys = typing.get_type_hints(cls), []
    for one in dataclasses.fields(cls):
        keys.append(f"{prefix}{one.name}")
        if dataclasses.is_dataclass(hints[one.name]):
            keys += _dotted_keys(hints[one.name], f"{prefix}{one.name}.")
    return keys


def convert(hint: Any, value: Any, where: str) -> Any:
    """Check a YAML value against a type hint. A scalar without quotes (`Plain`) is read as the type of the hint."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, Plain) and value.value is None):
            return None
        (hint,) = [a for a in arguments if a is not type(None)]  # the type of every key is X or X | None
        return convert(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return build_section(typing.cast(type, hint), value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"`{where}` is {_SHORT.repr(value)}; it must be one of {', '.join(map(str, arguments))}")
        return arguments[arguments.index(value)]
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise UserError(f"`{where}` must be a list like [a, b], not {_SHORT.repr(value)}")
        return origin(convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"`{where}` must be `key: value` pairs, not {_SHORT.repr(value)}")
        return {convert(arguments[0], k, where): convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    if hint is str and isinstance(value, str):
        return _text(value, where)
    is_bare = isinstance(value, Plain) or (
        isinstance(value, str) and hint is float
    )  # quoted rates have always been accepted
    if hint is bool and is_bare and value.lower() in _YAML_1_1_BOOLEANS:
        return _YAML_1_1_BOOLEANS[value.lower()]
    try:
        typed = Plain(value).value if is_bare else value
    except ValueError:  # thousands of digits
        typed = None
    if hint is float and type(typed) in (int, float) and abs(typed) <= sys.float_info.max:
        return float(typed)
    if typed == float("inf") and where in _NO_LIMIT:
        return typed
    if type(typed) is hint and hint is not float:
        return typed
    expected = _TYPE_NAMES[hint]
    if hint is int and type(typed) is float and typed.is_integer():
        expected += f" (write {int(typed)})"
    raise UserError(f"`{where}` must be {expected}, not {_SHORT.repr(str(value) if is_bare else value)}")


def _text(value: str, where: str) -> str:
    """The text as written: `no` is a language and 123 a directory. An empty value needs quotes."""
    if isinstance(value, Plain) and value.value is None:
        raise UserError(
            f"""`{where}` must be text, not {value or "empty"}; write it in quotes ("{value}") if it is meant"""
        )
    if "\0" in value:
        raise UserError(f"`{where}` holds a NUL character, which no file name can have: {_SHORT.repr(str(value))}")
    return str(value)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The resolved recipe with every default, as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(as_tree(recipe), sort_keys=False, allow_unicode=True)


def as_tree(section: Any) -> dict[str, Any]:
    """A dataclass as nested plain dictionaries and lists."""
    return _plain(dataclasses.asdict(section))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
