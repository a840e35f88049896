"""Tagging after fine-tuning: the teacher, its copied layers and students of several numbers of steps, on UD treebanks.

    python -m demo.teacher
    python benchmarks/bench_tagging.py --data UD [--steps 150 400 1600] [--recipe FILE] [--set KEY=VALUE]
        [--evaluate tagging.KEY=VALUE] [--work DIR] [--quick] [--json FILE]

`UD` is a directory with clones of UD treebanks: one with a training file of `tagging.train_language` (en), the others with
test files. Each number of steps is a run of the recipe of its own, so its learning rate falls to 0. All models are
fine-tuned and tested by one `pipeline evaluate --tasks tagging`. Finished runs and grid points are kept in the work
directory. Columns: accuracy in the language of training, mean of the others (zero-shot), and both as shares of the teacher's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import arguments, publish
from demo.__main__ import export, prepare_shards, run_stage, train
from demo.compare import untrained_student
from demo.settings import QUICKSTART
from pipeline.config import load_recipe

# 250 steps of 16 sentences at one rate. The grid of `evaluate` has 15 680 steps of 32 on English-EWT.
# `piece=text`: at a lone marker the tags of Chinese words are mostly wrong (docs/evaluating.md).
DEFAULTS = ["learning_rates=[2e-4]", "epochs=2", "batch=16", "max_train=2000", "max_evaluation=300", "piece=text"]
QUICK = ["learning_rates=[1e-4]", "epochs=1", "batch=16", "max_train=32", "max_evaluation=10"]


def make_students(recipe_path: Path, overrides: list[str], steps: list[int], work: Path) -> dict[str, Path]:
    """Name of each model -> its directory: the teacher, the copied layers, and one student per number of steps."""
    recipe = load_recipe(recipe_path, overrides)
    prepare_shards(recipe)
    copied = work / "copied"
    if not (copied / "config.json").is_file():
        student = untrained_student(recipe)
        student.tokenizer.save_pretrained(copied)
        student.model.save_pretrained(copied)  # last: its config.json says that the directory is complete
    models = {"teacher": Path(recipe.teacher), "copied layers": copied}
    for number in steps:
        run_dir, changed = work / f"steps-{number}", [*overrides, f"steps={number}"]
        train(recipe_path, changed, load_recipe(recipe_path, changed), run_dir)
        export(run_dir)
        models[f"{number} steps"] = run_dir / "student"
    return models


def evaluated(models: dict[str, Path], data: Path, settings: list[str], output: Path) -> dict[str, Any]:
    """Results of the task by the models' names here."""
    words = [f"tagging.data={data}", *(f"tagging.{setting}" for setting in settings)]
    run_stage(
        [sys.executable, "-m", "pipeline", "evaluate", *map(str, models.values()), "--tasks", "tagging"]
        + ["--output", str(output), *(word for setting in words for word in ("--set", setting))]
    )
    found = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))["tasks"]["tagging"]
    return {name: found[str(path)] for name, path in models.items()}


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Scores in per cent: of the language of training, of each other language, and the mean of those."""
    scores = {language: next(iter(of.values())) for language, of in result["test"].items()}
    trained = result["train_language"].partition("_")[0]
    others = {language: score for language, score in scores.items() if language.partition("_")[0] != trained}
    same = [score for language, score in scores.items() if language not in others]
    mean = sum(others.values()) / len(others) if others else None
    return {"trained": sum(same) / len(same) if same else None, "zero_shot": mean, "languages": scores}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="UD", help="directory with clones of UD treebanks")
    parser.add_argument("--steps", type=int, nargs="*", default=[150, 400, 1600], help="default: 150 400 1600")
    parser.add_argument("--recipe", type=Path, default=QUICKSTART)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    parser.add_argument("--evaluate", action="append", default=[], metavar="KEY=VALUE", help="a setting of tagging")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_tagging"), help="default: runs/bench_tagging")
    options = parser.parse_args()
    given = [setting.removeprefix("tagging.") for setting in options.evaluate]
    settings = [*(QUICK if options.quick else DEFAULTS), *given]
    models = make_students(options.recipe, options.set, options.steps, options.work)
    results = evaluated(models, options.data, settings, options.work / "evaluation")
    of_model = {name: figures(result) for name, result in results.items()}
    teacher, languages = of_model["teacher"], list(of_model["teacher"]["languages"])
    rows = [
        [
            name,
            *(f"{found['languages'][language]:.1f}" for language in languages),
            *(_share(found[key], teacher[key]) for key in ("trained", "zero_shot")),
        ]
        for name, found in of_model.items()
    ]
    first = results["teacher"]
    title = f"Tagging, trained on {first['train_sentences']} sentences of {first['train_language']}, per cent"
    header = ["model", *languages, "language of training (share)", "zero-shot (share)"]
    publish(title, header, rows, {"settings": settings, "tagging": of_model}, options.json)


def _share(score: float | None, of_teacher: float | None) -> str:
    return "" if score is None or not of_teacher else f"{score:.2f} ({score / of_teacher:.3f})"


if __name__ == "__main__":
    main()
