"""Question answering: the two official measures by hand, windows and their conversion to text, learning, and bad input."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packaging.version import Version
from transformers import AutoTokenizer

from pipeline.__main__ import main
from pipeline.errors import UserError, exit_code_of
from pipeline.evaluation.encoder import load_encoder
from pipeline.evaluation.finetuning.mlqa import (
    MlqaConfig,
    answer_scores,
    evaluate_mlqa,
    mlqa_table,
    read,
    span_loss,
    words_of,
)
from pipeline.evaluation.finetuning.squad_data import Question, read_squad
from pipeline.evaluation.finetuning.squad_metrics import exact_match, f1, mlqa_words, squad_words
from pipeline.evaluation.finetuning.squad_windows import (
    COMPLETE_WINDOWS_SINCE,
    Window,
    best_answers,
    check_last_window,
    cut_windows,
    target_tokens,
)
from pipeline.evaluation.ranks import alone
from tests.unit.evaluation.questions import ANSWER, TOKENIZERS, WRONG, needs_all_windows, write_mlqa

# -- the measures, by hand


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Eiffel Tower!", ["eiffel", "tower"]),
        ("a   theme, an apple", ["theme", "apple"]),  # articles only as separate words
        ("U.S.A.", ["usa"]),  # punctuation goes before words are made
        ("“quoted” – text", ["“quoted”", "–", "text"]),  # SQuAD's punctuation is ASCII's
        ("the", []),
    ],
)
def test_words_of_squad(text: str, words: list[str]) -> None:
    assert squad_words(text) == words


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("en", "“The quoted” – text", ["quoted", "text"]),
        ("en", "$5+", ["5"]),  # symbols to Unicode, punctuation to ASCII
        ("de", "Der Fluss in den Alpen, eine Quelle", ["fluss", "in", "alpen", "quelle"]),
        ("de", "The river", ["the", "river"]),
        ("es", "¿Las casas de la playa?", ["casas", "de", "playa"]),
        ("vi", "những ngôi nhà của tôi", ["ngôi", "nhà", "tôi"]),
        ("hi", "the राम।", ["the", "राम"]),
        ("ar", "البيت الكبير", ["بيت", "كبير"]),
        ("ar", "بالبيت", ["ب", "بيت"]),  # wherever the two letters occur
        ("zh", "2008年在北京，IBM Watson", ["2008", "年", "在", "北", "京", "ibm", "watson"]),
    ],
)
def test_words_of_mlqa(language: str, text: str, words: list[str]) -> None:
    assert mlqa_words(text, language) == words


def test_f1_and_exact_match_by_hand() -> None:
    # precision 2/3, recall 2/4: 2 * (2/3 * 1/2) / (2/3 + 1/2) = 4/7
    assert f1(["big", "old", "barn"], ["the", "old", "barn", "there"]) == pytest.approx(4 / 7)
    # repetition counts: one common `a` of two and one, so 2 * (1/2 * 1) / (3/2) = 2/3
    assert f1(["a", "a"], ["a"]) == pytest.approx(2 / 3)
    assert (f1(["x"], ["y"]), f1([], []), f1(["x"], [])) == (0.0, 0.0, 0.0)
    assert (exact_match(["x", "y"], ["x", "y"]), exact_match(["y", "x"], ["x", "y"]), exact_match([], [])) == (1, 0, 1)
    # Chinese is compared by characters: 2 of 3 and 2 of 2, so 0.8; cut at blanks it would be 0
    assert f1(words_of("北京市", "zh", "mlqa"), words_of("北京", "zh", "mlqa")) == pytest.approx(0.8)
    assert f1(words_of("北京市", "zh", "squad"), words_of("北京", "zh", "squad")) == 0.0


# -- windows


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher: Path):
    return AutoTokenizer.from_pretrained(tiny_teacher)


def question_on(context: str, answer: str, identifier: str = "q1") -> Question:
    return Question(identifier, "Which word is it?", context, (answer,), (context.index(answer),))


LONG = " ".join(
    f"{word}{number}" for number, word in enumerate(["Größe", "файл", "你好世界", "file", "x", "हिन्दी"] * 9)
)


@needs_all_windows
@pytest.mark.parametrize(
    "answer", ["Größe0", "файл25", "好世界32", "हिन्दी53", "file3 x4 हिन्दी5", "x40 हिन्दी41 Größe42"]
)
def test_an_answer_is_recovered_from_its_tokens(tokenizer, answer: str) -> None:
    question = question_on(LONG, answer)
    windowed = cut_windows(tokenizer, [question], max_length=60, stride=16)
    with_answer = [row for row, (start, _) in enumerate(windowed.rows.targets.tolist()) if start]
    assert with_answer, "a window has the answer"
    for row in with_answer:
        window, (start, end) = windowed.windows[row], windowed.rows.targets[row].tolist()
        begin, stop = window.offsets[start - window.first, 0], window.offsets[end - window.first, 1]
        assert answer in LONG[begin:stop], "the tokens cover the answer"
        # and no more than the rest of the pieces at its ends
        inner_begin, inner_stop = window.offsets[start - window.first, 1], window.offsets[end - window.first, 0]
        assert inner_begin > question.starts[0]
        assert inner_stop < question.starts[0] + len(answer)


@needs_all_windows
def test_windows_start_a_stride_apart_and_cover_the_context(tokenizer) -> None:
    question = question_on(LONG, "x4")
    windowed = cut_windows(tokenizer, [question], max_length=60, stride=16)
    uncut = cut_windows(tokenizer, [question], max_length=4000, stride=16).windows[0].offsets
    assert len(windowed.windows) > 2
    for number, window in enumerate(windowed.windows):
        assert np.array_equal(window.offsets, uncut[number * 16 : number * 16 + len(window.offsets)])
        ids = windowed.rows.ids[number]
        assert len(ids) <= 60
        assert window.first + len(window.offsets) == len(ids) - 1, "context, then one closing special"
    assert np.array_equal(windowed.windows[-1].offsets[-1], uncut[-1])
    # exactly one window has the most context around each token
    shown = np.zeros(len(uncut), dtype=int)
    for number, window in enumerate(windowed.windows):
        shown[number * 16 : number * 16 + len(window.offsets)] += window.most_context
    assert (shown == 1).all()
    assert windowed.windows[0].most_context[0]
    assert not windowed.windows[1].most_context[0]


def test_windows_that_tokenizers_0_23_2_returned() -> None:
    """Lengths as returned for `LONG` with the demo's tokenizer, `max_length` 60 and `stride` 16, then those of 0.23.3."""
    with pytest.raises(
        UserError, match=r"126 tokens into 2 windows that end at token 60.*pip install 'tokenizers~=0.23.3'"
    ):
        check_last_window([51, 44], step=16, num_tokens=126)
    check_last_window([51, 51, 51, 51, 51, 46], step=16, num_tokens=126)
    with pytest.raises(UserError, match="end at token 115"):  # one of them missing
        check_last_window([51, 51, 51, 51, 51], step=16, num_tokens=126)


def test_installed_tokenizers_returns_every_window_or_is_rejected(tokenizer) -> None:
    """`make test-versions` runs this with versions on both sides of the fix."""
    windows = partial(cut_windows, tokenizer, [question_on(LONG, "x4")], max_length=60, stride=16)
    if Version(TOKENIZERS) < Version(COMPLETE_WINDOWS_SINCE):
        with pytest.raises(UserError, match=f"tokenizers {TOKENIZERS} cut a context"):
            windows()
    else:
        assert len(windows().windows) > 2


@needs_all_windows
def test_questions_of_any_length_keep_their_order(tokenizer) -> None:
    contexts = ["one file", LONG, "two files and more", LONG[::-1]]
    questions = [Question(str(n), "why " * (40 * n + 1), c, (c[:3],), (0,)) for n, c in enumerate(contexts)]
    windowed = cut_windows(tokenizer, questions, max_length=100, stride=16)
    of_each = windowed.rows_of_each()
    assert [row for rows in of_each for row in rows] == list(range(len(windowed.windows)))
    assert [len(rows) > 1 for rows in of_each] == [False, True, False, True]
    for number, rows in enumerate(of_each):
        first = windowed.windows[rows[0]]
        assert contexts[number][: first.offsets[0, 1]].strip() == contexts[number][slice(*first.offsets[0])].strip()
        assert first.first <= 64 + 3, "a question is cut at 64 tokens"
    with pytest.raises(UserError, match="no space"):
        cut_windows(tokenizer, questions, max_length=40, stride=16)


def test_a_window_without_the_complete_answer_has_target_token_0() -> None:
    offsets = np.array([[4, 8], [9, 13]])
    question = Question("q", "?", "abc defg hijk lmn", ("hijk lmn",), (9,))
    assert target_tokens(question, 5, offsets) == (0, 0)
    assert target_tokens(question, 5, np.array([[4, 8], [9, 13], [14, 17]])) == (6, 7)


def test_the_best_span_by_hand() -> None:
    context = "aa bb cc dd"
    offsets = np.array([[0, 2], [3, 5], [6, 8], [9, 11]])
    window = Window(0, 3, offsets, np.array([True, True, True, True]))
    starts, ends = np.array([0.0, 5.0, 4.0, 0.0]), np.array([6.0, 0.0, 3.0, 1.0])
    # 5 + 6 would be best, but its end is before its start; next are bb..cc with 5 + 3 and cc with 4 + 3
    best = best_answers(context, [window], [starts], [ends])
    assert best[:2] == [(8.0, "bb cc"), (7.0, "cc")]
    elsewhere = Window(0, 3, offsets, np.array([True, False, True, True]))
    assert best_answers(context, [elsewhere], [starts], [ends])[0] == (7.0, "cc"), "bb has more context elsewhere"
    long = Window(0, 0, np.array([[n, n + 1] for n in range(40)]), np.ones(40, dtype=bool))
    rising, falling = np.arange(40.0), -np.arange(40.0)
    text = "".join(chr(97 + n % 26) for n in range(40))
    assert len(best_answers(text, [long], [falling], [rising])[0][1]) <= 30
    two = best_answers(context, [window, elsewhere], [starts, starts + 2], [ends, ends])
    assert two[0] == (9.0, "cc"), "the best of all windows"


def test_the_loss_by_hand() -> None:
    # two real positions and one of padding, which counts for nothing however large its logit
    outputs = SimpleNamespace(
        start_logits=torch.tensor([[0.0, math.log(3), 50.0]]), end_logits=torch.tensor([[0.0, 0.0, 50.0]])
    )
    inputs = {"attention_mask": torch.tensor([[1, 1, 0]])}
    loss = span_loss(outputs, inputs, torch.tensor([[1, 0]]))
    assert float(loss) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


# -- learning


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mlqa(tmp_path_factory.mktemp("mlqa"), gold={"en": ANSWER, "zh": ANSWER, "hi": WRONG})


def config(directory: Path, **settings: object) -> MlqaConfig:
    quick = {
        "learning_rates": [3e-3],
        "epochs": 4,
        "batch": 12,
        "max_length": 32,
        "stride": 8,
        "languages": ["en", "zh", "hi"],
    }
    return MlqaConfig(train=str(directory / "train-v1.1.json"), data=str(directory), **{**quick, **settings})


@needs_all_windows
def test_an_answer_that_is_always_one_word_is_learned(tiny_teacher: Path, official: Path, tmp_path: Path) -> None:
    encoder = load_encoder(str(tiny_teacher))
    result = evaluate_mlqa([encoder], config(official), alone(), tmp_path)[encoder.name]
    assert result["test"]["en"]["f1"] >= 80
    assert result["test"]["zh"]["exact_match"] >= 75
    assert result["test"]["hi"]["f1"] <= 20, "there another word is correct"
    assert result["mean"]["f1"] == pytest.approx(sum(scores["f1"] for scores in result["test"].values()) / 3)
    row = mlqa_table({"student": result}).splitlines()[-1]
    assert f"{result['mean']['f1']:.1f} /" in row
    again = evaluate_mlqa([encoder], config(official), alone(), tmp_path)[encoder.name]
    assert again == result, "kept"


def test_the_best_match_of_several_correct_answers_counts(tokenizer) -> None:
    question = Question("q", "?", "aa network file bb", ("file bb", "network file"), (11, 3))
    windowed = cut_windows(tokenizer, [question], max_length=60, stride=16)
    window = windowed.windows[0]
    begin = int(np.searchsorted(window.offsets[:, 0], 3, side="right")) - 1
    end = int(np.searchsorted(window.offsets[:, 1], 15, side="left"))

    class Sure:
        device = torch.device("cpu")

        def __call__(self, input_ids, attention_mask):
            starts, ends = torch.zeros(1, input_ids.shape[1]), torch.zeros(1, input_ids.shape[1])
            starts[0, window.first + begin] = ends[0, window.first + end] = 9.0
            return SimpleNamespace(start_logits=starts, end_logits=ends)

    scores = answer_scores(Sure(), windowed, "en", 1, MlqaConfig(), alone())
    assert scores == {"f1": 100.0, "exact_match": 100.0}


# -- bad input


def test_missing_data_and_languages(official: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--set mlqa\.train="):
        read(MlqaConfig())
    with pytest.raises(
        UserError, match=r"no dev-context-de-question-de\.json found below .*; it has en, hi, zh.*\[en\]"
    ):
        read(config(official, languages=["en", "de"]))
    library = config(official)
    library.data = "datasets:facebook/mlqa"
    with pytest.raises(UserError, match="from a directory only"):
        read(library)
    missing = config(official)
    missing.train = str(tmp_path / "train.json")
    with pytest.raises(UserError, match=r"train\.json not found"):
        read(missing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.update(answers=[]), "question q0: no answer"),
        (lambda entry: entry.update(question="  "), "question q0: question or context is empty"),
        (
            lambda entry: entry["answers"][0].update(answer_start=9999),
            r"question q0: the answer 'network' is not at character 9999",
        ),
        (lambda entry: entry["answers"][0].pop("text"), "question q0: lacks 'text'"),
        (lambda entry: entry.pop("id"), r"data\[0\]\.paragraphs\[0\]: lacks 'id'"),
    ],
)
def test_a_bad_question_is_named(official: Path, tmp_path: Path, change, message: str) -> None:
    tree = json.loads((official / "train-v1.1.json").read_text())
    change(tree["data"][0]["paragraphs"][0]["qas"][0])
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=message):
        read_squad(path)


def test_a_byte_order_mark_is_skipped(official: Path, tmp_path: Path) -> None:
    (tmp_path / "marked.json").write_text((official / "train-v1.1.json").read_text(), encoding="utf-8-sig")
    assert read_squad(tmp_path / "marked.json") == read_squad(official / "train-v1.1.json")


@pytest.mark.parametrize("text", ["", "[1]", '{"data": []}', '{"data": 3}', "\xff"])
def test_a_file_in_another_layout(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"bad\.json"):
        read_squad(tmp_path / "bad.json")


def test_the_library_gives_the_same_questions(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    expected = read_squad(official / "train-v1.1.json", 5)
    rows = [
        {"id": q.identifier, "question": q.question, "context": q.context}
        | {"answers": {"text": list(q.answers), "answer_start": list(q.starts)}}
        for q in expected
    ]
    data = tmp_path / "data"  # not in the cache, whose lock files the library reads as splits
    data.mkdir()
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    library = config(official, max_train=5)
    library.train = f"datasets:{data}"
    assert read(library).train == expected


@pytest.mark.parametrize(("setting", "message"), [("mlqa.stride=0", "stride"), ("mlqa.rule=xquad", "mlqa, squad")])
def test_bad_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str) -> None:
    command = ["evaluate", "nowhere", "--tasks", "mlqa", "--output", str(tmp_path), "--set", setting]
    assert exit_code_of(lambda: main(command)) == 2
    assert message in capsys.readouterr().err
