"""`--where` keeps the records whose columns meet it; columns that cannot be compared are an error, and nulls are counted."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.shards import DataError, ShardSet
from data_prep.sources import CorruptSource, ReadOptions, Source, WrongTextField
from data_prep.where import MISMATCH, NOT_MET, NULL, OPERATORS, Where
from tests.unit.data_prep.corpus import run_command

NUMBERS = st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6, allow_nan=False)


@given(sign=st.sampled_from(sorted(OPERATORS)), value=NUMBERS, found=NUMBERS, gap=st.sampled_from(["", " ", "  "]))
def test_numbers_are_compared_as_python_does(sign: str, value: float, found: float, gap: str) -> None:
    where = Where.parse([f"score{gap}{sign}{gap}{value!r}"])
    expected = {">=": found >= value, ">": found > value, "<=": found <= value, "<": found < value,
                "==": found == value, "!=": found != value}[sign]  # fmt: skip
    assert where.problem({"score": found}) == (None if expected else NOT_MET)


@pytest.mark.parametrize(
    ("text", "kept", "left_out"),
    [
        ("lang == 'de'", {"lang": "de"}, {"lang": "en"}),
        ('lang != "a and b" and n > -1.5e3', {"lang": "a", "n": 0}, {"lang": "a and b", "n": 0}),
        ("id == 9007199254740993", {"id": 2**53 + 1}, {"id": 2**53}),  # no float64 has this value
        ("`my score` >= .5", {"my score": Decimal("0.5")}, {"my score": Decimal("0.49")}),
        ("is_clean == TRUE", {"is_clean": True}, {"is_clean": False}),
        ("wert_ä.ö < 1 AND x == ''", {"wert_ä.ö": 0, "x": ""}, {"wert_ä.ö": 0, "x": " "}),
        ("lang == 'ü'", {"lang": "ü".encode()}, {"lang": b"\xfc"}),
    ],
)
def test_conditions_of_each_kind(text: str, kept: dict[str, Any], left_out: dict[str, Any]) -> None:
    where = Where.parse([text])
    assert where.problem(kept) is None
    assert where.problem(left_out) == NOT_MET
    assert Where.parse([str(where)] if "`" not in text else [text]) == where


@pytest.mark.parametrize("sign", ["==", ">=", "<="])
@pytest.mark.parametrize("value", ["0.8", "0.7", "1e-3", "3", "-2.5"])
@pytest.mark.parametrize("kind", ["decimal128(9, 4)", "float16", "float32", "float64"])
def test_a_number_equals_itself_in_every_type_of_column(tmp_path: Path, sign: str, value: str, kind: str) -> None:
    column = pyarrow.array([Decimal(value)], pyarrow.decimal128(9, 4))
    if not kind.startswith("decimal"):
        column = pyarrow.array([np.dtype(kind).type(value)], pyarrow.from_numpy_dtype(kind))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["kept"], "x": column}), tmp_path / "en.parquet")
    options = ReadOptions(where=Where.parse([f"x {sign} {value}"]))
    assert b"".join(Source("en", tmp_path / "en.parquet", "en.parquet", options).chunks()) == b"kept\n\n"


def test_equal_filters_are_recorded_the_same() -> None:
    assert (
        str(Where.parse(["b>1.0 and a == 'x'"]))
        == str(Where.parse(["a=='x'", " b > 1 ", "b > 1"]))
        == 'a == "x" and b > 1'
    )


@pytest.mark.parametrize("value", [None, math.nan])
def test_null_and_nan_meet_no_condition(value: Any) -> None:
    for sign in OPERATORS:
        assert Where.parse([f"x {sign} 1"]).problem({"x": value}) == NULL


@pytest.mark.parametrize("record", [{}, {"x": "1"}, {"x": True}, {"x": [1]}, 1])
def test_other_types_are_a_mismatch(record: Any) -> None:
    assert Where.parse(["x >= 1"]).problem(record) == MISMATCH


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read ''"),
        ("score", "cannot read 'score'"),
        ("score = 1", "For equality write =="),
        ("score => 1", "unknown operator '=>'"),
        ("score >= abc", "'abc' is no number. >= compares numbers"),
        ("score >= nan", "is no number"),
        ("score >= 1e999", "is too large a number"),
        ("score >= 0x10", "is no number"),
        ("lang > 'de'", "> compares numbers"),
        ("score >= 1 or score < 0", "expected `and`, found 'or score"),
        ("score >= 1 and", "cannot read ''|expected `and`"),
        ("__import__('os') == 1", "cannot read|unknown operator|expected"),
        ("score >= 'open", "cannot read"),
    ],
)
def test_what_is_not_of_the_grammar_is_named(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Where.parse([text])


SCORED: list[dict[str, Any]] = [{"text": f"Zeile {n}.", "score": None if n % 10 == 3 else n / 100} for n in range(100)]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=7)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_filtered_records_are_counted_and_recorded(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    write(tmp_path / "in" / f"de.{kind}", SCORED)
    options = ("--where", "score >= 0.5", "--where", "score<0.9")
    assert run_command(tmp_path / "in", tiny_tokenizer, tmp_path / "out", *options) == 0
    assert "64 records were left out by --where (54 do not meet it, 10 null or NaN)" in capsys.readouterr().err
    manifest = ShardSet(tmp_path / "out").manifest
    assert manifest["options"]["where"] == "score < 0.9 and score >= 0.5"
    assert manifest["languages"]["de"]["documents"] == 36
    assert {kind: manifest["languages"]["de"]["counts"][kind] for kind in (NOT_MET, NULL)} == {NOT_MET: 54, NULL: 10}
    assert run_command(tmp_path / "in", tiny_tokenizer, tmp_path / "out", "--where", "score >= 0.6") == 2
    assert "where is 'score < 0.9 and score >= 0.5' there and 'score >= 0.6' here" in capsys.readouterr().err


def test_without_a_filter_the_options_are_those_of_before(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """The hash of the options is in every shard, so a new key would change the shards of everybody."""
    write(tmp_path / "in" / "de.jsonl", SCORED)
    assert run_command(tmp_path / "in", tiny_tokenizer, tmp_path / "out") == 0
    assert "where" not in ShardSet(tmp_path / "out").manifest["options"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "scores >= 1",
            r"--where 'scores >= 1'.*(no column 'scores'; its columns are text \(string\)|they have text, score)",
        ),
        ("text >= 1", r"--where 'text >= 1'.*(is of type string, not number|missing or of another type)"),
        ("score == 'de'", r"(is of type double, not text|missing or of another type)"),
        ("score == true", r"(is of type double, not true/false|missing or of another type)"),
    ],
)
def test_a_column_that_cannot_be_compared_is_an_error(tmp_path: Path, kind: str, where: str, message: str) -> None:
    path = write(tmp_path / f"de.{kind}", [record for record in SCORED if record["score"] is not None])
    with pytest.raises(WrongTextField, match=message):
        list(Source("de", path, path.name, ReadOptions(where=Where.parse([where]))).chunks())


@pytest.mark.parametrize("where", [(), ("n >= 1",)])
def test_two_columns_of_one_name_are_an_error(tmp_path: Path, where: tuple[str, ...]) -> None:
    name = "n" if where else "text"
    columns = {"text": ["a"], name: [1], "other": ["b"]}
    table = pyarrow.Table.from_arrays([*map(pyarrow.array, [*columns.values(), [2]])], names=[*columns, name])
    pyarrow.parquet.write_table(table, tmp_path / "de.parquet")
    source = Source("de", tmp_path / "de.parquet", "de.parquet", ReadOptions(where=Where.parse(where)))
    with pytest.raises(WrongTextField, match=rf"there are 2 columns '{name}'; its columns are .*Rename them"):
        list(source.chunks())


def test_a_record_without_the_column_may_be_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "de.jsonl", [{"text": "a", "n": 1}, {"text": "b"}, {"text": "c", "n": 1}])
    reading = ReadOptions(where=Where.parse(["n == 1"]))
    source = Source("de", path, path.name, reading)
    assert b"".join(source.chunks()) == b"a\n\nc\n\n"
    assert source.counts == {MISMATCH: 1}
    strict = ReadOptions(bad_records="fail", where=reading.where)
    with pytest.raises(CorruptSource, match=r"line 2 is text, but the record has no value that --where 'n == 1'"):
        list(Source("de", path, path.name, strict).chunks())


def test_a_record_that_the_filter_leaves_out_needs_no_text(tmp_path: Path) -> None:
    """`--bad-records fail` stops only at records that would be kept."""
    left_out = [{"text": None, "n": 2}, {"n": 2}, {"text": 5, "n": 2}, {"text": None, "n": None}]
    strict = ReadOptions(bad_records="fail", where=Where.parse(["n == 1"]))
    path = write(tmp_path / "de.jsonl", [*[{"text": "a", "n": 1}] * 5, *left_out])
    source = Source("de", path, path.name, strict)
    assert b"".join(source.chunks()) == b"a\n\n" * 5
    path = write(tmp_path / "de.jsonl", [{"text": "a", "n": 1}, {"text": None, "n": 1}])
    with pytest.raises(CorruptSource, match="field 'text' of line 2 is null"):
        list(Source("de", path, path.name, strict).chunks())


def test_lines_of_text_have_no_columns(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "de.txt").write_text("Eine Zeile.\n")
    assert run_command(tmp_path / "in", tiny_tokenizer, tmp_path / "out", "--where", "score >= 0.5") == 2
    assert "holds lines of text and no columns" in capsys.readouterr().err
    write(tmp_path / "in" / "sv.jsonl", SCORED)  # one language of several
    only = ("--where", "score >= 0.5", "--language", "sv")
    assert run_command(tmp_path / "in", tiny_tokenizer, tmp_path / "out", *only) == 0


def test_a_filter_that_nothing_meets_is_told(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in" / "de.parquet", SCORED)
    assert run_command(tmp_path / "in", tiny_tokenizer, tmp_path / "out", "--where", "score >= 50") == 2
    said = capsys.readouterr().err
    assert "there is no text in" in said
    assert "100 records were left out by --where (90 do not meet it, 10 null or NaN)" in said
