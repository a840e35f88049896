"""The adapter to the mteb package, on tasks that mteb makes up without a download, and what is said where it is missing."""

from __future__ import annotations

import builtins
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.__main__ import main
from pipeline.errors import UserError, exit_code_of
from pipeline.evaluation.encoder import load_encoder, sentence_vectors
from pipeline.evaluation.mteb_suite import TASK, MtebConfig, MtebEncoder, chosen_tasks, run_mteb
from pipeline.evaluation.pooling import Dense
from pipeline.evaluation.sts import spearman
from pipeline.export.sentence_transformers_files import write_dense


def test_the_package_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    import_module = builtins.__import__

    def without_mteb(name: str, *arguments, **more):
        if name == "mteb":
            raise ImportError("No module named 'mteb'")
        return import_module(name, *arguments, **more)

    monkeypatch.delitem(sys.modules, "mteb", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_mteb)
    assert exit_code_of(lambda: main(["evaluate", "nowhere", "--tasks", "mteb", "--output", str(tmp_path)])) == 2
    assert "-m pip install 'mteb>=2,<3'" in capsys.readouterr().err


def test_the_table_and_the_card() -> None:
    results = {
        model: {"mean": mean, "per_task": {"STS17": mean}, "main_score": {"STS17": "cosine_spearman"}, "pooling": "output", "mteb_version": "2.1"}
        for model, mean in (("teacher", 0.5), ("student", 0.25))
    }  # fmt: skip
    assert TASK.table(results).splitlines()[-2].split() == ["STS17", "cosine_spearman", "0.500", "0.250"]
    assert "| STS17 | cosine_spearman | 0.500 | 0.250 |" in TASK.card(results)
    assert TASK.panels(results)[0].values["student"] == {"STS17": 0.25, "mean": 0.25}


# -- with the package


@pytest.fixture
def mteb():
    return pytest.importorskip("mteb", reason="pip install 'mteb>=2,<3'")


def test_names_that_mteb_does_not_know(mteb) -> None:
    with pytest.raises(UserError, match=r"Name some: --set 'mteb\.tasks"):
        chosen_tasks(MtebConfig())
    with pytest.raises(UserError, match=r"mteb 2.*STS0815.*Correct mteb\.tasks"):
        chosen_tasks(MtebConfig(tasks=["STS0815"]))
    with pytest.raises(UserError, match=r"Correct mteb\.tasks, mteb\.benchmark"):
        chosen_tasks(MtebConfig(benchmark="MTEB(Nowhere)"))
    assert [task.metadata.name for task in chosen_tasks(MtebConfig(tasks=["STS17"], languages=["eng"]))] == ["STS17"]


def test_languages_choose_the_parts_of_tasks_and_benchmarks(mteb) -> None:
    with pytest.raises(UserError, match=r"SciFact.*\['deu'\].*Correct mteb\.tasks, mteb\.benchmark or mteb\.languages"):
        chosen_tasks(MtebConfig(tasks=["STS17", "SciFact"], languages=["deu"]))
    tasks = chosen_tasks(MtebConfig(benchmark="MTEB(Multilingual, v2)", languages=["swh"]))
    assert 0 < len(tasks) < len(chosen_tasks(MtebConfig(benchmark="MTEB(Multilingual, v2)")))
    for task in tasks:
        assert all(any("swh" in x for x in task.metadata.hf_subsets_to_langscripts[part]) for part in task.hf_subsets)
    with pytest.raises(UserError, match=r"no task of MTEB\(eng, v2\) has the languages swh"):
        chosen_tasks(MtebConfig(benchmark="MTEB(eng, v2)", languages=["swh"]))


def test_scores_of_the_real_package(mteb, tiny_teacher: Path, tmp_path: Path) -> None:
    mock_tasks = pytest.importorskip("mteb.mocks.mock_tasks", reason="this version of mteb has no tasks without data")
    encoder = load_encoder(str(tiny_teacher))
    config = MtebConfig(max_length=32, batch_size=4)
    tasks = [mock_tasks.MockSTSTask(), mock_tasks.MockRetrievalTask()]
    found = run_mteb(encoder, tasks, config, tmp_path)
    assert found["mean"] == pytest.approx(sum(found["per_task"].values()) / 2)

    sts = tasks[0]
    sts.load_data()  # mteb has dropped it
    pairs = sts.dataset["test"]
    first, second = (list(pairs[column]) for column in sts.column_names)
    vectors = sentence_vectors(encoder, first + second, 32, 4)[0]["output"]
    cosines = (vectors[: len(first)] * vectors[len(first) :]).sum(dim=1)
    assert found["per_task"][sts.metadata.name] == pytest.approx(
        spearman(cosines.numpy(), np.array(pairs["score"])), abs=1e-5
    )
    again = run_mteb(encoder, tasks, config, tmp_path)  # read from its files, which have six digits
    assert again["per_task"] == pytest.approx(found["per_task"], abs=1e-6)
    other = MtebEncoder(encoder, MtebConfig(max_length=32, document_prefix="passage: "))
    assert other.mteb_model_meta.revision != MtebEncoder(encoder, config).mteb_model_meta.revision


def test_a_kept_score_of_other_languages_does_not_count(mteb, tiny_teacher: Path, tmp_path: Path) -> None:
    mock_tasks = pytest.importorskip("mteb.mocks.mock_tasks", reason="this version of mteb has no tasks without data")
    encoder, config = load_encoder(str(tiny_teacher)), MtebConfig(max_length=32, batch_size=4)
    both, one = mock_tasks.MockMultilingualSTSTask(), mock_tasks.MockMultilingualSTSTask()
    run_mteb(encoder, [both], config, tmp_path)
    (kept,) = tmp_path.rglob(f"{both.metadata.name}.json")
    content = json.loads(kept.read_text())
    for score, of_part in zip(
        (0.25, 0.75), sorted(content["scores"]["test"], key=lambda x: x["hf_subset"]), strict=True
    ):
        of_part["main_score"] = score
    kept.write_text(json.dumps(content))
    one.filter_languages(["eng"])
    assert run_mteb(encoder, [both], config, tmp_path)["mean"] == 0.5
    assert run_mteb(encoder, [one], config, tmp_path)["mean"] == 0.25


def test_a_kept_score_of_another_projection_does_not_count(mteb, tiny_teacher: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_teacher, tmp_path / "model"))
    revisions = set()
    for seed in range(2):
        shutil.rmtree(model / "2_Dense", ignore_errors=True)
        write_dense(model, Dense(torch.randn(20, 48, generator=torch.Generator().manual_seed(seed))))
        revisions.add(MtebEncoder(load_encoder(str(model)), MtebConfig()).mteb_model_meta.revision)
    assert len(revisions) == 2
