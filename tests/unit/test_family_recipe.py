"""`students` of a recipe: each is the recipe of that student alone, names are file names, and only three sections differ."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import Recipe, load_recipe, recipe_to_yaml
from pipeline.errors import UserError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FAMILY = """
steps: 7
relations: {heads: 12, teacher_layer: 3}
student: {layers: 2, hidden: 24, heads: 2}
students:
  deep: {student: {layers: 4, dropout: 0.1}, optimizer: {lr: 5e-4, gradient_clipping: .inf}}
  pairs: {relations: {teacher_layer: null, layers: [{teacher: 2, student: 1}, {teacher: 3, student: 2, weight: 0.5}]}}
  like-the-recipe:
"""


def load(tmp_path: Path, text: str = FAMILY, *overrides: str) -> Recipe:
    path = tmp_path / "family.yaml"
    path.write_text(text)
    return load_recipe(path, list(overrides))


def test_a_member_of_a_family_is_the_recipe_of_this_student_alone(tmp_path):
    family = load(tmp_path)
    alone = load(tmp_path, FAMILY.partition("students:")[0])
    deep, pairs, same = family.members().values()
    assert list(family.members()) == ["deep", "pairs", "like-the-recipe"]
    assert alone.members() == {"": alone}
    assert same == alone
    changed = ["student.layers=4", "student.dropout=0.1", "optimizer.lr=5e-4", "optimizer.gradient_clipping=.inf"]
    assert deep == load(tmp_path, FAMILY.partition("students:")[0], *changed)
    assert pairs == replace(alone, relations=pairs.relations)
    assert pairs.relations.teacher_taps == [2, 3]
    assert pairs.relations.heads == 12


def test_a_family_recipe_survives_its_own_yaml(tmp_path):
    family = load(tmp_path)
    again = tmp_path / "again.yaml"
    again.write_text(recipe_to_yaml(family))
    assert load_recipe(again, []) == family
    assert load_recipe(again, []).members() == family.members()


def test_an_override_reaches_one_student_of_a_family(tmp_path):
    family = load(
        tmp_path, FAMILY, "students.deep.student.layers=3", "students.new.student.layers=1", "students.pairs="
    )
    assert [member.student.layers for member in family.members().values()] == [3, 2, 2, 1]
    assert family.members()["pairs"].relations.layers is None
    assert load(tmp_path, FAMILY, "students=null").students is None
    same = load(tmp_path, FAMILY, "students.like-the-recipe.optimizer.lr=0.5").members()["like-the-recipe"]
    assert same.optimizer.lr == 0.5
    with pytest.raises(UserError, match=r"students\.like-the-recipe: `seq_len` cannot differ"):
        load(tmp_path, FAMILY, "students.like-the-recipe.seq_len=8")


@pytest.mark.parametrize(
    ("students", "message"),
    [
        ("{a: {student: {layers: 1}}, a: {}}", "the key `a` occurs twice"),
        ("{small: {}, Small: {}}", "names small and Small, which are one directory"),
        ("{../up: {}}", "cannot name files"),
        ("{a.b: {}}", "cannot name files"),
        ("{'': {}}", "cannot name files"),
        ("{.hidden: {}}", "cannot name files"),
        (f"{{{'x' * 65}: {{}}}}", "cannot name files"),
        (
            "{a: {seq_len: 64}}",
            "students.a: `seq_len` cannot differ between the students of a run; what can differ: student, ",
        ),
        ("{a: {teacher: other}}", "students.a: `teacher` cannot differ"),
        ("{a: {vocabulary: other}}", "students.a: `vocabulary` cannot differ"),
        ("{a: {students: {}}}", "students.a: `students` cannot differ"),
        ("{a: {studnet: {}}}", "students.a: `studnet` is no key of a student"),
        ("{a: {student: {layres: 2}}}", "students.a: unknown key `student.layres`; did you mean `layers`"),
        ("{a: {student: {layers: two}}}", "students.a: `student.layers` must be int"),
        ("{a: {student: {hidden: 25}}}", "students.a: 2 attention heads do not divide the student's width of 25"),
        ("{a: {student: 3}}", "students.a: `student` must be a section"),
        ("{a: 3}", "students.a: must be a section"),
        ("{a: {relations: {after_rotary: true}}}", "students.a: `relations.after_rotary` cannot differ"),
        (
            "{a: {relations: {layers: [{teacher: 1, student: 1}]}}}",
            "students.a: `relations.layers` needs at least one pair",
        ),
        ("{}", "`students` must map at least one name"),
        ("[a, b]", "`students` must map at least one name"),
    ],
)
def test_a_family_that_cannot_be_is_rejected_by_name(tmp_path, students, message):
    with pytest.raises(UserError) as found:
        load(tmp_path, f"{FAMILY.partition('students:')[0]}\nstudents: {students}\n")
    assert message in " ".join(str(found.value).split())


def test_the_family_recipes_here_are_the_single_recipes():
    family = load_recipe(RECIPES / "xlmr_large_family.yaml", []).members()
    for name, single in (("12x384", "xlmr_large_l12_h384"), ("6x384", "xlmr_large_l6_h384")):
        alone = load_recipe(RECIPES / f"{single}.yaml", [])
        assert family[name] == replace(alone, steps=1_000_000), name
    quickstart = load_recipe(RECIPES / "quickstart.yaml", [])
    assert load_recipe(RECIPES / "quickstart_family.yaml", []).members()["6x384"] == quickstart
    rates = load_recipe(RECIPES / "sweep_rate.yaml", []).members()
    assert rates["lr-1e-3"] == quickstart
    layers = load_recipe(RECIPES / "sweep_teacher_layer.yaml", []).members()
    assert layers["layer-12"] == replace(quickstart, student=layers["layer-12"].student)
    assert {member.relations.teacher_layer for member in layers.values()} == {7, 8, 9, 10, 11, 12}


def test_the_demo_names_what_trains_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first stage, and not at the export after the training."""
    demo = importlib.import_module("demo.__main__")
    monkeypatch.setattr("sys.argv", ["demo", "--recipe", str(RECIPES / "quickstart_family.yaml")])
    monkeypatch.setattr(demo, "say", lambda *unused: pytest.fail("a stage began"))
    with pytest.raises(
        UserError, match=r"the demo shows one student, and .* has 3\. Train them: .*deepspeed pipeline/train.py "
    ):
        demo.main()
