"""The metadata of a model card, which a model hub reads: license, base model, data sets, languages, figures.

In: the lineage of an export, the export, and directories with figures. Out: the YAML at the top of its README.md. What is not
known is left out; a license that is not known is named so, as the hub asks for one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from pipeline.evaluation.task import tasks
from pipeline.export.card_evaluation import Exported, evaluated
from pipeline.recipe.text import shown
from pipeline.runtime.json_files import read_json

UNKNOWN = "unknown"  # the hub's own word
SENTENCES = ["The shop is closed today.", "Der Laden ist heute geschlossen.", "It will rain tomorrow."]
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSE_NAME = re.compile(r"[a-z0-9.+-]{1,64}")


def front_matter(lineage: dict[str, Any], export: Exported, measured: Iterable[Path]) -> str:
    """The metadata with its lines of dashes; languages by their main code (zh-Hans is zh).

    Args:
        measured: directories with `demo.json` (a run) or `evaluation.json`. Of these, the figures of this export are taken.
    """
    is_sentences = (export.files / "modules.json").is_file()
    library, task = (
        ("sentence-transformers", "sentence-similarity") if is_sentences else ("transformers", "feature-extraction")
    )
    content: dict[str, Any] = {
        "license": lineage.get("license") or UNKNOWN,
        "library_name": library,
        "pipeline_tag": task,
    }
    teacher = str(lineage.get("teacher", ""))
    if _HUB_NAME.fullmatch(teacher) and not Path(teacher).exists():
        content["base_model"] = teacher
    if names := [name for name in lineage.get("data_sets") or [] if _HUB_NAME.fullmatch(str(name))]:
        content["datasets"] = names
    content["tags"] = ["minilmv2", "distillation", "multilingual"]
    languages = lineage.get("trimmed", lineage).get("languages") or []
    if languages:
        content["language"] = sorted({language.split("-")[0].split("_")[0] for language in languages})
    content["widget"] = [
        {"source_sentence": SENTENCES[0], "sentences": SENTENCES[1:]} if is_sentences else {"text": SENTENCES[0]}
    ]
    # a run's demo has measured its student with the complete vocabulary
    steps = None if "trimmed" in lineage else lineage.get("steps")
    results = [*_results(steps, export, measured)]
    if results:
        content["metrics"] = sorted({one["metrics"][0]["type"] for one in results})
        of = Path(teacher).name if re.fullmatch(r"[\w./-]+", teacher) else "a teacher"
        content["model-index"] = [{"name": f"MiniLMv2 student of {of}", "results": results}]
    return "---\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True) + "---"


def license_of(teacher: str) -> str | None:
    """The license in the model card of a teacher: in its directory, or in the cache of a hub name. None: there is none."""
    card: Any = Path(teacher) / "README.md"
    if not card.is_file() and _HUB_NAME.fullmatch(teacher):
        card = try_to_load_from_cache(teacher, "README.md")
    try:
        head = Path(card).read_text(encoding="utf-8").partition("---\n")[2].partition("\n---")[0]
        found = yaml.safe_load(head)["license"]
    except (OSError, TypeError, ValueError, KeyError, RecursionError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) and _LICENSE_NAME.fullmatch(found) else None


def _results(steps: int | None, export: Exported, measured: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """What was measured of this export, in the hub's format. The last of several figures of one kind counts."""
    means = _means(steps, export, measured)
    for (task, measure), value in {(task, key): value for task, mean in means for key, value in mean.items()}.items():
        on_hub = tasks()[task].on_hub if task in tasks() else None
        if on_hub and measure in on_hub.metrics and isinstance(value, int | float) and math.isfinite(value):
            name = f"{shown(measure)}, mean of the languages"
            metric = {"type": on_hub.metrics[measure], "value": round(float(value), 4), "name": name}
            data = {"type": task, "name": on_hub.name}
            yield {"task": {"type": on_hub.kind}, "dataset": data, "metrics": [metric]}


def _means(steps: int | None, export: Exported, measured: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of a task, figures by measure), as they were measured one after the other."""
    for place in dict.fromkeys(measured):
        if steps is not None and (place / "demo.json").is_file():
            demo = read_json(place / "demo.json")
            if demo.get("steps") == steps:
                yield "retrieval", {"output": demo.get("after_mean")}
        for task, models in evaluated(place, export)[0].items():
            of_this = [result.get("mean") for model, result in models.items() if export.is_named(model)]
            if of_this and isinstance(of_this[-1], dict):
                yield task, of_this[-1]
