"""Half precision, the figures of the model card, and the upload: which files it sends, and how a failure is reported."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import huggingface_hub.constants
import pytest
import torch
import yaml
from huggingface_hub import RepoUrl
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from pipeline.__main__ import main
from pipeline.distillation.models.teacher import load_encoder
from pipeline.errors import UserError
from pipeline.export import push as upload
from pipeline.export.card import CARD_FILE
from pipeline.export.hf import Export, export_student
from pipeline.export.push import files_to_push
from pipeline.export.sentence_transformers_files import add_sentence_transformers
from tests.unit.evaluation.all_tasks import TASKS

LINEAGE = {"teacher": "a/teacher", "steps": 12, "languages": ["de", "zh-Hans"], "recipe": {"steps": 12}}


@pytest.fixture
def student(tiny_teacher: Path, tmp_path: Path) -> Path:
    return exported(tiny_teacher, tmp_path / "student")


def exported(tiny_teacher: Path, output: Path, dtype: torch.dtype = torch.float32) -> Path:
    model = load_encoder(tiny_teacher)
    extras = [add_sentence_transformers]
    return export_student(Export(model.state_dict(), model.config, str(tiny_teacher), LINEAGE, extras, dtype), output)


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_half_precision_is_the_rounded_model(tiny_teacher: Path, tmp_path: Path) -> None:
    output = exported(tiny_teacher, tmp_path / "half", torch.float16)
    full = load_encoder(tiny_teacher).state_dict()
    stored = load_file(output / "model.safetensors")
    assert stored.keys() == full.keys()
    assert all(torch.equal(stored[name], tensor.half()) for name, tensor in full.items())
    assert AutoModel.from_pretrained(output).dtype == torch.float16
    card = (output / CARD_FILE).read_text()
    assert "AutoModel.from_pretrained(DIRECTORY, add_pooling_layer=False, dtype=torch.float32)" in card
    assert "dtype" not in (exported(tiny_teacher, tmp_path / "single") / CARD_FILE).read_text().split("## Lineage")[0]


def test_the_card_has_the_figures(student: Path, tmp_path: Path) -> None:
    bare = (student / CARD_FILE).read_text()
    assert "## What was measured" not in bare
    assert front_matter(bare)["language"] == ["de", "zh"]
    assert "SentenceTransformer(DIRECTORY)" in bare
    run = tmp_path / "run"
    run.mkdir()
    pair = {stage: {"output": mean} for stage, mean in (("teacher", 0.901), ("before", 0.502), ("after", 0.803))}
    means = {
        f"{stage}_mean{suffix}": 0.111
        for stage in ("teacher", "before", "after")
        for suffix in ("", "_values", "_last_input")
    }
    demo = {**means, "after_mean": 0.804, "per_pair": {"de": pair}, "steps": 12}
    (run / "demo.json").write_text(json.dumps(demo))
    points = [
        {"step": 0, "heldout/mean": 3.25, "heldout/de": 3.5},
        {"step": 12, "heldout/mean": 0.5, "heldout/de": 0.75},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points) + '{"step": 13, "he')
    (student / "onnx").mkdir()
    found = {"retrieval_mean": 0.641, "greatest_difference": 1.5e-6}
    check = {
        "languages": ["de"],
        "further_languages": ["he", "uk"],
        "sentences": 4,
        "megabytes": {"fp32": 8, "int8": 2},
    }
    (student / "onnx" / "check.json").write_text(
        json.dumps({**check, "torch": found, "fp32": found, "int8": {**found, "retrieval_mean": 0.601}})
    )
    main(["card", str(student), str(run)])
    card = (student / CARD_FILE).read_text()
    for text in (
        "| student after training, output | 0.804 |",
        "| student after training | 0.803 |",
        "| de | 3.500 | 0.750 |",
        "| ONNX int8 | 2 | 0.601 | 1.5e-06 |",
        "the int8 file loses 0.040 of retrieval accuracy",
        "4 sentences of 1 language pairs and 2 further languages",
    ):
        assert text in card, text
    written = (student / CARD_FILE).stat().st_mtime_ns
    main(["card", str(student), str(run)])
    assert (student / CARD_FILE).stat().st_mtime_ns == written
    (run / "demo.json").write_text(json.dumps({**demo, "steps": 8}))
    main(["card", str(student), str(run)])
    assert "student after training" not in (student / CARD_FILE).read_text(), "the run continued after its demo"
    assert "| de | 3.500 | 0.750 |" in (student / CARD_FILE).read_text()


def test_every_task_of_an_evaluation_has_its_table(student: Path, evaluated: Path) -> None:
    main(["card", str(student), str(evaluated)])
    card = (student / CARD_FILE).read_text()
    tasks = json.loads((evaluated / "evaluation.json").read_text())["tasks"]
    assert list(tasks) == TASKS
    sections = dict(zip(tasks, re.split(r"### \w+, by `pipeline evaluate`\n", card)[1:], strict=True))
    for name in tasks["retrieval"]:
        rows = {task: rows_of(section, name) for task, section in sections.items()}
        heldout, speed = (tasks[task][name] for task in ("heldout", "speed"))
        assert rows["heldout"][""] == [f"{x:z.3f}" for x in (*heldout["per_language"].values(), heldout["mean"])]
        assert rows["speed"][""][2:] == [f"{x:.2f}x" for x in speed["times_first"].values()]
        for pooling in ("output", "last_input", "values"):
            found = tasks["retrieval"][name]
            expected = [f"{pair[pooling]['mean']:.3f}" for pair in found["per_pair"].values()]
            assert rows["retrieval"][pooling] == [*expected, f"{found['mean'][pooling]:.3f}"]
            found = tasks["sts"][name]
            (scored,) = found["per_file"].values()
            assert rows["sts"][pooling] == [f"{scored[pooling]:.3f}", f"{found['mean'][pooling]:.3f}"]
            ndcg = tasks["beir"][name]["per_collection"]["beir"][pooling]["ndcg@10"]
            assert f"| {name}, {pooling} | nDCG@10 | {ndcg:.3f} | {ndcg:.3f} |" in sections["beir"]
        for task, titles in (
            ("xnli", {"accuracy": "accuracy"}),
            ("mlqa", {"F1": "f1", "exact match": "exact_match"}),
            ("pawsx", {"accuracy": "accuracy"}),
            ("tagging", {"accuracy": "accuracy"}),
        ):
            if task not in tasks:
                continue
            found = tasks[task][name]
            for title, key in titles.items():
                expected = [f"{scores[key]:.1f}" for scores in (*found["test"].values(), found["mean"])]
                assert rows[task][title] == [*expected, "0.003", "1"]
    assert "12 pairs of en" in sections["xnli"]
    assert "12 sentences of en" in sections["tagging"]
    assert "mlqa" not in sections or "12 English questions" in sections["mlqa"]


def test_figures_of_an_earlier_export_are_not_those_of_the_next(
    student: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An export that is replaced, of a run that was continued, keeps its name in evaluation.json."""
    output, teacher = tmp_path / "evaluation", str(tiny_teacher)
    more = [f"--set=retrieval.{setting}" for setting in ("languages=[de]", "max_pairs=3", "max_length=60")]
    main(["evaluate", str(student), teacher, "--tasks", "retrieval", "--output", str(output), *more])
    main(["card", str(student), str(output)])
    card = (student / CARD_FILE).read_text()
    assert f"| {student}, output |" in card
    assert front_matter(card)["model-index"]
    assert "other weights" not in capsys.readouterr().err

    weights = load_file(student / "model.safetensors")
    weights["embeddings.LayerNorm.weight"] *= 2
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    main(["card", str(student), str(output)])
    card = (student / CARD_FILE).read_text()
    assert f"| {student}, output |" not in card
    assert f"| {teacher}, output |" in card
    assert "model-index" not in front_matter(card)
    assert f"has figures of other weights than {student} now has" in capsys.readouterr().err

    model = load_encoder(tiny_teacher)
    model.get_parameter("embeddings.LayerNorm.weight").data *= 3
    again = Export(model.state_dict(), model.config, teacher, LINEAGE, measured=[output])
    assert f"| {student}, output |" not in (export_student(again, student) / CARD_FILE).read_text()
    assert "other weights" in capsys.readouterr().err


def rows_of(section: str, model: str) -> dict[str, list[str]]:
    """Cells of one model's rows, by the text after its name."""
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return {row[0].partition(", ")[2]: row[1:] for row in rows if row[0].partition(", ")[0] == model}


def test_a_card_without_input(student: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"directory .*nowhere not found"):
        main(["card", str(student), str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"no lineage\.json"):
        main(["card", str(tmp_path)])
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json cannot be read"):
        main(["card", str(student), str(tmp_path)])


# -- upload


class Hub(BaseHTTPRequestHandler):
    """A hub that rejects every login."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A local server in place of the hub, without a login. Returns the paths that were requested."""
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield Hub.asked
    server.shutdown()
    server.server_close()


def push(tmp_path: Path, repository: str) -> str:
    """The error of an export with --push. The run directory need not exist, because the login is checked first."""
    with pytest.raises(UserError) as caught:
        main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "student"), "--push", repository])
    assert not (tmp_path / "student").exists()
    return str(caught.value)


def test_nobody_is_logged_in(hub: list[str], tmp_path: Path) -> None:
    message = push(tmp_path, "somebody/student")
    assert "nobody is logged in" in message
    assert "hf auth login" in message
    assert hub == []


def test_the_hub_rejects_the_login(hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    message = push(tmp_path, "somebody/student")
    assert "rejected the request (401)" in message
    assert "hf_x" not in message
    assert "/api/whoami-v2" in hub


def test_the_hub_cannot_be_reached(hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in push(tmp_path, "somebody/student")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "cannot be reached" in push(tmp_path, "somebody/student")


def test_an_impossible_name(tmp_path: Path) -> None:
    assert "not a possible name of a repository" in push(tmp_path, "some body//student")


def test_files_of_an_upload(student: Path) -> None:
    (student / ".cache").mkdir()
    (student / ".cache" / "x.json").write_text("{}")
    (student / "half.tmp").write_text("")
    assert files_to_push(student) == [
        "1_Pooling/config.json",
        "README.md",
        "config.json",
        "config_sentence_transformers.json",
        "lineage.json",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "sentencepiece.bpe.model",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


class FakeApi:
    """A hub with one repository, `me/model`, that an earlier export and its user have filled."""

    files: ClassVar[set[str]] = set()

    def create_repo(self, name: str, **more: object) -> RepoUrl:
        return RepoUrl("https://huggingface.co/me/model")

    def list_repo_files(self, name: str) -> list[str]:
        assert name == "me/model"
        return sorted(self.files)

    def upload_folder(
        self, repo_id: str, folder_path: Path, allow_patterns: list[str], delete_patterns: list[str], **more: object
    ) -> str:
        assert repo_id == "me/model"
        added = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        added = list(filter_repo_objects(added, allow_patterns=allow_patterns))
        removed = set(filter_repo_objects(self.files, allow_patterns=delete_patterns)) if delete_patterns else set()
        FakeApi.files = (self.files - removed) | set(added)
        return "address"


def test_an_upload_replaces_the_files_of_an_earlier_export(
    student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The modules and ONNX files of the export before belong to other weights. Files of the user stay."""
    monkeypatch.setattr(upload, "HfApi", FakeApi)
    of_user = {".gitattributes", "notes[1].md", "assets/curve.png", "assets/config.json"}
    earlier = {
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "onnx/model.onnx",
        "model-00001-of-00002.safetensors",
    }
    monkeypatch.setattr(FakeApi, "files", {*of_user, *earlier, *files_to_push(student)})
    assert upload.push(student, "model") == "address"
    assert FakeApi.files == of_user | set(files_to_push(student))
    said = capsys.readouterr().out
    assert f"removed from me/model, files of an earlier export: {', '.join(sorted(earlier))}" in said
    upload.push(student, "me/model")
    assert "removed" not in capsys.readouterr().out


def test_no_value_of_a_run_becomes_front_matter_or_markup(tiny_teacher: Path, tmp_path: Path) -> None:
    """A value with line breaks or markup stays one value."""
    hostile = "x\n---\nlicense: mit\n---\n```\n<script>alert(1)</script>\n| a | b |"
    lineage = {**LINEAGE, "teacher": hostile, "languages": ["de", hostile], "recipe": {"steps": 12, "teacher": hostile}}
    model = load_encoder(tiny_teacher)
    output = export_student(Export(model.state_dict(), model.config, str(tiny_teacher), lineage), tmp_path / "student")
    card = (output / CARD_FILE).read_text()
    head = card.split("\n---\n")[0]
    content = yaml.safe_load(head.removeprefix("---\n"))
    assert content["license"] == "unknown"
    assert content.keys() <= {"license", "library_name", "pipeline_tag", "tags", "language", "widget"}
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", card, flags=re.MULTILINE | re.DOTALL)
    assert "<script>" not in outside
    assert "\nlicense: mit" not in outside
