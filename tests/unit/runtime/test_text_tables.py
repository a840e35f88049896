"""Which side of a table of figures goes down the page, and how it is aligned."""

from __future__ import annotations

from pipeline.runtime.text_tables import figures_table

HEADER = ["model", "pooled from"]


def rows(num_models: int, num_figures: int) -> list[list[str]]:
    models = ["teacher", "runs/quickstart/student", "third"][:num_models]
    return [
        [model, pooled, *(f"0.{number:03d}" for number in range(num_figures))]
        for model in models
        for pooled in ("output", "values")
    ]


def test_models_are_rows_of_a_narrow_table() -> None:
    text = figures_table("accuracy", [*HEADER, "de", "ru", "mean"], rows(2, 3), ["<12", ">9"], ["a note"])
    assert text.split("\n") == [
        "accuracy",
        "model                    pooled from        de       ru     mean",
        "teacher                  output          0.000    0.001    0.002",
        "teacher                  values          0.000    0.001    0.002",
        "runs/quickstart/student  output          0.000    0.001    0.002",
        "runs/quickstart/student  values          0.000    0.001    0.002",
        "a note",
    ]


def test_models_are_columns_of_a_table_that_is_wide_otherwise() -> None:
    languages = [f"l{number}" for number in range(12)]
    text = figures_table("accuracy", [*HEADER, *languages], rows(2, 12), ["<12", ">9"], ["a note"]).split("\n")
    assert text[:4] == [
        "accuracy",
        "model        teacher          runs/quickstart/student",
        "pooled from   output  values                   output  values",
        "l0             0.000   0.000                    0.000   0.000",
    ]
    assert text[-2:] == ["l11            0.011   0.011                    0.011   0.011", "a note"]


def test_one_label_and_one_model() -> None:
    languages = [f"l{number}" for number in range(12)]
    text = figures_table("loss", ["model", *languages], [["one", *"abcdefghijkl"]], [">9"], []).split("\n")
    assert text[:3] == ["loss", "model  one", "l0       a"]
