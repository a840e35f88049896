"""Export the newest valid checkpoint of a run as a Hugging Face directory.

    python -m pipeline export runs/quickstart --output runs/quickstart/student
    python -m pipeline export runs/quickstart --output student --dtype fp16 --sentence-transformers --onnx
    python -m pipeline export runs/family --student small --step best --output small

`--student NAME` chooses one student of a run that trains several. `--step N` exports that checkpoint, and `--step best`
the one with the lowest held-out loss, which a run keeps that was trained with `checkpoint.keep_best: heldout`.
`--vocabulary DIR` cuts the vocabulary to the pieces that `python -m data_prep trim-vocab` kept.
`--sentence-transformers` adds the files with which SentenceTransformer(DIR) loads it; a learned projection of sentence
vectors is one of its modules, and `--drop-projection` leaves it out. `--onnx` adds onnx/model.onnx and
onnx/model_int8.onnx, checked against torch on the sentences of --check-pairs and on lines of --check-text in languages
that have no pairs. `--push OWNER/NAME` uploads the result to a private repository of a model hub; no other option needs
a hub.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import transformers

from data_prep.command_line import end_lines, module_command
from data_prep.outputs import output_path
from pipeline.distillation.models.vocabulary import read_vocabulary
from pipeline.evaluation.retrieval import RetrievalConfig, read_pairs
from pipeline.export.card import length_note, projection_note
from pipeline.export.handover import longest_input
from pipeline.export.hf import DTYPES, Extra, checked_place, export_run
from pipeline.export.onnx import add_onnx, checked_on, int8_warning
from pipeline.export.onnx_check_text import read_check_lines
from pipeline.export.push import check_login, push
from pipeline.export.sentence_transformers_files import add_sentence_transformers, drop_dense
from pipeline.export.trim import trim, trimming_lines
from pipeline.runtime.checkpoint import Step
from pipeline.runtime.json_files import read_json

CHECK_PAIRS = 30  # of each language
CHECK_LINES = 30  # of each language without pairs
MOST_DIGITS = 18  # of a step
SAMPLE_TEXT = Path("samples/cc100")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="what --run-dir of the training named")
    parser.add_argument(
        "--output", type=output_path, required=True, help="directory to write; an earlier export is replaced"
    )
    add_choice_of_student(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="precision of the stored weights")
    parser.add_argument("--vocabulary", type=Path, metavar="DIR", help="output of `python -m data_prep trim-vocab`")
    parser.add_argument(
        "--sentence-transformers", action="store_true", help="also write the files of a SentenceTransformer"
    )
    parser.add_argument(
        "--drop-projection",
        action="store_true",
        help="leave out the projection of sentence vectors that `relations.tail: pooled` has learned",
    )
    parser.add_argument("--onnx", action="store_true", help="also write ONNX files in fp32 and int8")
    parser.add_argument("--check-pairs", default="samples/parallel", help="directory of en-XX.tsv for the ONNX check")
    parser.add_argument(
        "--check-text",
        type=Path,
        help=f"directory of LANG.txt(.xz) for the ONNX check; default: {SAMPLE_TEXT} if it exists",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the export to this repository, private if new")


def add_choice_of_student(parser: argparse.ArgumentParser, action: str = "store") -> None:
    """The options `--student` and `--step`. `action`: "append" where several students can be named."""
    parser.add_argument("--student", action=action, metavar="NAME", help="which one, of a run with several students")
    parser.add_argument(
        "--step", type=step_of, metavar="N|best|last", help="which checkpoint (default: last, the newest valid one)"
    )


def run(arguments: argparse.Namespace) -> None:
    transformers.logging.disable_progress_bar()
    extras: list[Extra] = [drop_dense] if arguments.drop_projection else []
    if arguments.sentence_transformers:
        extras.append(add_sentence_transformers)
    if arguments.onnx:
        # read before the export, so that a wrong path fails immediately
        further = further_lines(arguments.check_pairs, arguments.check_text)
        extras.append(lambda directory: _add_onnx(directory, arguments.check_pairs, further))
    if arguments.push:
        check_login(arguments.push)
    student = _export(arguments, extras)
    if arguments.onnx:
        check = read_json(student / "onnx" / "check.json")
        print(onnx_lines(check))
        if warning := int8_warning(check):
            print(warning, file=sys.stderr, flush=True)
    size_mb = (student / "model.safetensors").stat().st_size / 1e6
    for note in filter(None, [length_note(student), projection_note(student)]):
        print(note)
    if arguments.push:
        print(f"pushed: {push(student, arguments.push)}")
    about = f"{size_mb:.0f} MB; load it with AutoModel.from_pretrained({str(student)!r})"
    then = module_command("pipeline", "evaluate", student, "--output", f"{student}-evaluation")
    print(end_lines(student, about=about, then=then))


def _export(arguments: argparse.Namespace, extras: Sequence[Extra]) -> Path:
    """Export the student of the run. For a smaller vocabulary, export it to a temporary directory and trim it."""
    dtype = DTYPES[arguments.dtype]
    which = (dtype, arguments.student or "", arguments.step)
    if arguments.vocabulary is None:
        return export_run(arguments.run_dir, arguments.output, extras, *which)
    checked_place(arguments.run_dir, arguments.output, arguments.student or "")  # the first export goes elsewhere
    vocabulary = read_vocabulary(arguments.vocabulary)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.output.parent) as temporary:
        untrimmed = export_run(arguments.run_dir, Path(temporary) / "untrimmed", (), *which)
        print(trimming_lines(trim(untrimmed, vocabulary, arguments.output, extras, arguments.run_dir)))
    return arguments.output


def step_of(text: str) -> Step:
    """The `type` of `--step`; None: the newest valid checkpoint."""
    if text == "last":
        return None
    if text == "best":
        return "best"
    if text.isdecimal() and len(text) <= MOST_DIGITS:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a number of steps, best or last")


def further_lines(pairs: str, text: Path | None) -> dict[str, list[str]]:
    """Language -> lines on which the ONNX files are checked in addition to the pairs."""
    paired = {"en", *read_pairs(RetrievalConfig(pairs=pairs))}
    directory = text or SAMPLE_TEXT
    return read_check_lines(directory, paired, CHECK_LINES) if text or directory.is_dir() else {}


def _add_onnx(directory: Path, pairs: str, further: dict[str, list[str]]) -> None:
    longest = min(128, longest_input(directory))
    add_onnx(directory, RetrievalConfig(pairs=pairs, max_pairs=CHECK_PAIRS, max_length=longest), further)


def onnx_lines(check: dict) -> str:
    """The result of the check, for the console."""
    title = f"ONNX against torch on {checked_on(check)}:"
    lines = [title, f"  torch  retrieval {check['torch']['retrieval_mean']:.3f}"]
    for name in ("fp32", "int8"):
        found = check[name]
        lines.append(
            f"  {name}   retrieval {found['retrieval_mean']:.3f}, greatest difference of a hidden state "
            f"{found['greatest_difference']:.1e}, {check['megabytes'][name]:.0f} MB"
        )
    return "\n".join(lines)
