"""One real evaluation with every task, small enough to be run once for all tests that read its files."""

from __future__ import annotations

from pathlib import Path

from pipeline.__main__ import main
from pipeline.evaluation.finetuning.squad_metrics import MLQA_LANGUAGES
from pipeline.evaluation.task import tasks
from tests.unit.evaluation.collections import write_collection
from tests.unit.evaluation.labelled_pairs import write_pawsx, write_xnli
from tests.unit.evaluation.questions import ANSWER, HAS_ALL_WINDOWS, write_mlqa
from tests.unit.evaluation.tagged_words import write_ud

QUICK = {
    "heldout": ("heads=12", "seq_len=32", "heldout_rows=1"),
    "retrieval": ("languages=[de, sw]", "max_pairs=4", "max_length=60"),
    "beir": ("max_length=60",),
    "sts": ("max_length=60",),
    "xnli": ("learning_rates=[3e-3]", "epochs=1", "batch=6", "max_length=48"),
    "pawsx": ("learning_rates=[3e-3]", "epochs=1", "batch=6", "max_length=48"),
    "mlqa": ("learning_rates=[3e-3]", "epochs=1", "batch=6", "max_length=32", "stride=8", "languages=[en, zh]"),
    "tagging": ("learning_rates=[3e-3]", "epochs=1", "batch=6", "max_length=48"),
    "speed": ("batches=[1]", "lengths=[8]", "rounds=1", "seconds_per_turn=0.0"),
}

NOT_HERE = {"mteb"} if HAS_ALL_WINDOWS else {"mteb", "mlqa"}  # the mteb package downloads its data
TASKS = [name for name in tasks() if name not in NOT_HERE]


def quick_settings(directory: Path) -> list[str]:
    """Values of `--set` for every task; the data that they need is written to the directory."""
    pairs, questions = directory / "xnli_data", directory / "mlqa_data"
    write_xnli(pairs, train=12, evaluation=3, languages=("en", "de"))
    write_mlqa(questions, dict.fromkeys(MLQA_LANGUAGES, ANSWER), train=12, evaluation=2)
    paraphrases = write_pawsx(directory / "x-final", train=12, evaluation=3)
    collection = write_collection(directory / "beir")
    treebanks = write_ud(directory / "ud", train=12, evaluation=3)
    scored = directory / "scored.tsv"
    scored.write_text("a file\tthe file\t5\na file\tthe user\t1\non that system\tin this system\t3\n")
    settings = [f"{task}.{setting}" for task, of_task in QUICK.items() for setting in of_task]
    settings += [
        f"sts.files=[{scored}]",
        f"xnli.data={pairs}",
        f"tagging.data={treebanks}",
        f"pawsx.data={paraphrases}",
        f"beir.data=[{collection}]",
    ]
    return [*settings, f"mlqa.data={questions}", f"mlqa.train={questions / 'train-v1.1.json'}"]


def evaluate_everything(
    models: list[str], teacher: Path, shards: Path, directory: Path, without: tuple[str, ...] = ()
) -> Path:
    """Evaluate the models in `TASKS`. Returns the directory with `evaluation.json`. Settings that begin with one of `without` keep their default."""
    output = directory / "evaluation"
    settings = [setting for setting in quick_settings(directory) if not setting.startswith(without or "\0")]
    main(
        ["evaluate", *models, "--tasks", ",".join(TASKS), "--output", str(output)]
        + ["--teacher", str(teacher), "--data", str(shards)]
        + [word for setting in settings for word in ("--set", setting)]
    )
    return output
