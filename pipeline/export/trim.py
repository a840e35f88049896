"""Cut a model to a smaller vocabulary. Most parameters of a small multilingual model are embeddings.

    python -m data_prep trim-vocab --tokenizer artifacts/teacher --shards artifacts/shards --languages de,ru --output VOC
    python -m pipeline trim runs/quickstart/student --vocabulary VOC --output student_small

In: a Hugging Face directory and a vocabulary cut from its tokenizer. Out: the same model with fewer embedding rows and the
smaller tokenizer, for sentence-transformers if it was before. Before it is kept, its hidden states are checked to be equal to the last bit.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from data_prep.command_line import end_lines, module_command
from data_prep.outputs import check_output_place, output_path
from pipeline.data.tokenizer_hash import tokenizer_sha256
from pipeline.distillation.models.loading import load_config
from pipeline.distillation.models.sentence_files import MODULES_FILE, UnknownSettingsError, sentence_settings
from pipeline.distillation.models.vocabulary import Vocabulary, cut_embedding, read_vocabulary
from pipeline.errors import UserError
from pipeline.evaluation.encoder import Encoder, load_encoder
from pipeline.evaluation.pooling import Dense, modules_without_effect, read_dense
from pipeline.export.hf import LINEAGE_FILE, Export, Extra, export_student
from pipeline.export.sentence_transformers_files import add_sentence_transformers
from pipeline.runtime.json_files import read_json_if_there

CHECKED_ROWS = 64
CHECKED_TOKENS = 62  # per row; few enough for the smallest model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face directory with its tokenizer")
    parser.add_argument("--vocabulary", type=Path, required=True, help="output of `python -m data_prep trim-vocab`")
    parser.add_argument(
        "--output", type=output_path, required=True, help="directory to write; an earlier export is replaced"
    )


def run(arguments: argparse.Namespace) -> None:
    transformers.logging.disable_progress_bar()
    report = trim(arguments.model, read_vocabulary(arguments.vocabulary), arguments.output)
    print(trimming_lines(report))
    then = module_command("pipeline", "evaluate", arguments.output, "--output", f"{arguments.output}-evaluation")
    print(end_lines(arguments.output, then=then))


def trim(
    source: Path,
    vocabulary: Vocabulary,
    output: Path,
    extras: Sequence[Extra] = (),
    run_dir: Path | None = None,
) -> dict[str, Any]:
    """Write the trimmed model to `output`, in the precision of `source`.

    Args:
        extras: functions that add files to the output directory
        run_dir: the run that `source` is a temporary export of, for the lineage

    Returns:
        number of pieces and parameters before and after, and of checked rows
    """
    check_output_place(output, "--output", {"the model": source, "the vocabulary": vocabulary.directory})
    vocabulary.check_source(tokenizer_sha256(source), str(source))
    encoder = load_encoder(str(source))
    parameters_before = encoder.model.num_parameters()
    rows_BL = random_rows(vocabulary, encoder.model.config.pad_token_id)
    states_before = hidden_states(encoder, vocabulary.old_ids_V[rows_BL])
    cut_embedding(encoder.model, vocabulary)
    report = {
        "pieces": [vocabulary.source_vocab_size, len(vocabulary)],
        "parameters": [parameters_before, encoder.model.num_parameters()],
        "checked_rows": len(rows_BL),
    }
    lineage = read_json_if_there(source / LINEAGE_FILE)
    cut = {key: vocabulary.about[key] for key in ("languages", "min_count", "coverage")}
    if (before := (lineage.get("trimmed") or {}).get("languages")) is not None:  # the pieces of others were cut then
        cut["languages"] = [language for language in cut["languages"] if language in before]
    lineage["trimmed"] = {"from": str(run_dir or source), **cut, "pieces": report["pieces"]}
    dense = read_dense(source)
    if (source / MODULES_FILE).is_file():
        extras = [*_sentence_files(source, lineage, dense), *extras]
    export = Export(
        encoder.model.state_dict(),
        encoder.model.config,
        str(vocabulary.directory),
        lineage,
        extras=[lambda directory: check_equal(states_before, directory, rows_BL), *extras],
        dtype=torch.float16 if load_config(source, "model").dtype == torch.float16 else torch.float32,
        projection=dense,
    )
    export_student(export, output)
    return report


def _sentence_files(source: Path, lineage: dict[str, Any], dense: Dense | None) -> list[Extra]:
    """What writes the sentence-transformers files of a model that has them. Its settings are added to the lineage."""
    try:
        found = sentence_settings(str(source), "auto")
    except UnknownSettingsError as error:
        print(
            f"warning: {error.cause}; the trimmed model has no sentence-transformers files", file=sys.stderr, flush=True
        )
        return []
    if left_out := modules_without_effect(found, dense):
        print(
            f"warning: the trimmed model has no {', '.join(left_out)}, which {source / MODULES_FILE} lists",
            file=sys.stderr,
            flush=True,
        )
    lineage.setdefault("sentences", found.settings.recorded())
    return [functools.partial(add_sentence_transformers, source=source)]


def random_rows(vocabulary: Vocabulary, padding: int | None) -> torch.Tensor:
    """Random new ids, `[CHECKED_ROWS, CHECKED_TOKENS]`, without the piece whose old id is `padding`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(len(vocabulary))[vocabulary.old_ids_V != (-1 if padding is None else padding)]
    return ids[torch.randint(len(ids), (CHECKED_ROWS, CHECKED_TOKENS), generator=generator)]


@torch.inference_mode()
def hidden_states(encoder: Encoder, rows_BL: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states of each row, computed alone: the shape of a batch can change the last bit."""
    return [
        encoder.model(input_ids=ids_L[None].to(encoder.device)).last_hidden_state.cpu() for ids_L in rows_BL.unbind()
    ]


def check_equal(states_before: list[torch.Tensor], trimmed: Path, rows_BL: torch.Tensor) -> None:
    """Raise a `UserError` unless the written model has the hidden states of the untrimmed one, to the last bit."""
    states = hidden_states(load_encoder(str(trimmed)), rows_BL)
    if not all(torch.equal(*both) for both in zip(states_before, states, strict=True)):
        raise UserError(
            "hidden states changed by trimming, so nothing was written. This is an error of the program; please report it."
        )


def trimming_lines(report: dict[str, Any]) -> str:
    """The sizes before and after, for the console."""
    (pieces_before, pieces_after), (before, after) = report["pieces"], report["parameters"]
    return "\n".join(
        [
            f"pieces      {pieces_before:>11,} -> {pieces_after:>11,}",
            f"parameters  {before:>11,} -> {after:>11,}  ({after / before:.2f}x)",
            f"checked: hidden states of {report['checked_rows']} rows of {CHECKED_TOKENS} kept ids equal to the last bit",
        ]
    )
