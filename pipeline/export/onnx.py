"""ONNX files of an export, checked against torch on real sentences.

In: a Hugging Face directory. Out: `onnx/model.onnx` (fp32), `onnx/model_int8.onnx` (dynamic quantization) and
`onnx/check.json`: greatest difference of the hidden states, retrieval accuracy of torch, fp32 and int8, sizes. The check
reads the sentences of the pairs and lines of further languages.
Inputs are `input_ids` and `attention_mask` of any batch and length; the output is `last_hidden_state`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.command_line import module_command
from data_prep.progress import progress
from pipeline.errors import UserError
from pipeline.evaluation.encoder import Encoder, load_encoder, pad_rows
from pipeline.evaluation.retrieval import RetrievalConfig, both_directions, read_pairs

GREATEST_DIFFERENCE = 1e-4  # of any hidden state of a real token; seen: 2e-6
GREATEST_INT8_LOSS = 0.02  # of retrieval accuracy; the quickstart student loses 0.001
FILES = {"fp32": "model.onnx", "int8": "model_int8.onnx"}
REQUIREMENTS = ("onnx>=1.23.2,<2", "onnxscript>=0.7.2,<0.8", "onnxruntime>=1.32,<2")  # as the extra `onnx`
HiddenStates = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _LastHiddenState(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def add_onnx(
    directory: Path, config: RetrievalConfig, further: Mapping[str, list[str]] | None = None
) -> dict[str, Any]:
    """Write and check both files.

    Args:
        config: the sentence pairs of the check
        further: language -> lines, for languages without pairs

    Returns:
        the content of `check.json`

    Raises:
        UserError: a package is missing, or the fp32 file differs from torch
    """
    try:
        import onnx
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        install = module_command("pip", "install", *REQUIREMENTS)
        raise UserError(f"ONNX export needs the package {error.name}. Install it: {install}") from None
    encoder = load_encoder(str(directory))
    encoder.model.to("cpu")
    (directory / "onnx").mkdir(exist_ok=True)
    paths = {precision: directory / "onnx" / name for precision, name in FILES.items()}
    fp32, int8 = map(str, paths.values())
    with _quiet():
        _export(encoder, paths["fp32"])
        onnx.checker.check_model(fp32)
        # Retrieval accuracy that the quickstart student loses: 0.024 with one scale per matrix, 0.003 with one per channel,
        # 0.001 with one per channel and 7-bit weights (reduce_range), whose products cannot saturate on CPUs without
        # 8-bit dot products.
        quantize_dynamic(fp32, int8, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
    runs: dict[str, HiddenStates] = {"torch": _torch_run(encoder)}
    for precision, path in paths.items():
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        runs[precision] = _onnx_run(session)
    check = compare_runs(encoder, runs, config, further)
    check["megabytes"] = {name: round(path.stat().st_size / 1e6, 1) for name, path in paths.items()}
    check_difference(check["fp32"]["greatest_difference"])
    (directory / "onnx" / "check.json").write_text(json.dumps(check, indent=2) + "\n", encoding="utf-8")
    return check


def check_difference(difference: float) -> None:
    """Raise a `UserError` where the fp32 file differs from torch by more than `GREATEST_DIFFERENCE`."""
    if not difference <= GREATEST_DIFFERENCE:
        raise UserError(
            f"the ONNX export differs from torch by {difference:.1e} (the limit is {GREATEST_DIFFERENCE}), so nothing "
            "was exported. Try the versions of torch, onnx and onnxruntime in requirements.txt and requirements-dev.txt"
        )


def checked_on(check: dict[str, Any]) -> str:
    """How much text the check read, for a message."""
    pairs = f"{check['sentences']} sentences of {len(check['languages'])} language pairs"
    further = check.get("further_languages")
    return pairs + (f" and {len(further)} further languages" if further else "")


def int8_warning(check: dict[str, Any]) -> str:
    """A warning if the int8 file is much worse than the model, else an empty text."""
    lost = round(check["torch"]["retrieval_mean"] - check["int8"]["retrieval_mean"], 4)
    if lost <= GREATEST_INT8_LOSS:
        return ""
    return (
        f"WARNING: the int8 file loses {lost:.3f} of retrieval accuracy against torch (more than {GREATEST_INT8_LOSS}). Do not "
        "use it untested: use onnx/model.onnx, or evaluate the int8 file on its task."
    )


def _export(encoder: Encoder, path: Path) -> None:
    rows = encoder.tokenizer(["Hello world!", "Ein Satz von anderer Länge."])["input_ids"]
    example = pad_rows(rows, encoder.pad_id, torch.device("cpu"))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    sizes = {0: batch, 1: length}
    program = torch.onnx.export(
        _LastHiddenState(encoder.model).eval(),
        example,
        input_names=["input_ids", "attention_mask"],
        output_names=["last_hidden_state"],
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    assert program is not None
    program.save(path)


@contextlib.contextmanager
def _quiet():
    """Suppress the long output of the exporter and the quantizer."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _torch_run(encoder: Encoder) -> HiddenStates:
    @torch.inference_mode()
    def run(input_ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        return encoder.model(input_ids=input_ids_BL, attention_mask=mask_BL).last_hidden_state

    return run


def _onnx_run(session: Any) -> HiddenStates:
    def run(input_ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        feeds = {"input_ids": input_ids_BL.numpy(), "attention_mask": mask_BL.numpy()}
        return torch.from_numpy(session.run(["last_hidden_state"], feeds)[0])

    return run


def compare_runs(
    encoder: Encoder,
    runs: dict[str, HiddenStates],
    config: RetrievalConfig,
    further: Mapping[str, list[str]] | None = None,
) -> dict[str, Any]:
    """Compare hidden states of several forms of one encoder over the same batches.

    Args:
        runs: name -> function from `input_ids` and mask `[B, L]` to hidden states `[B, L, D]`; the first is the reference

    Returns:
        per run, the greatest difference to the first one and the mean retrieval accuracy; and what was compared
    """
    pairs_of, further = read_pairs(config), further or {}
    paired = {text for pairs in pairs_of.values() for pair in pairs for text in pair}
    texts = sorted(paired.union(*further.values()))
    row_of = {text: row for row, text in enumerate(texts)}
    ids = encoder.tokenizer(texts, truncation=True, max_length=config.max_length)["input_ids"]
    vectors: dict[str, list[torch.Tensor]] = {name: [] for name in runs}
    differences = dict.fromkeys(runs, 0.0)
    starts = range(0, len(ids), config.batch_size)
    for start in progress(starts, "checking ONNX against torch", "batch"):
        rows = ids[start : start + config.batch_size]
        input_ids_BL, mask_BL = pad_rows(rows, encoder.pad_id, torch.device("cpu"))
        first: torch.Tensor | None = None
        for name, run in runs.items():
            states_BLD = run(input_ids_BL, mask_BL) * mask_BL.unsqueeze(-1)
            first = states_BLD if first is None else first
            differences[name] = max(differences[name], (states_BLD - first).abs().max().item())
            vectors[name].append(encoder.pooling(states_BLD, mask_BL))
    report: dict[str, Any] = {"languages": list(pairs_of), "further_languages": list(further), "sentences": len(texts)}
    for name in runs:
        matrix = torch.cat(vectors[name])
        accuracies = [
            both_directions(matrix, [row_of[a] for a, _ in pairs], [row_of[b] for _, b in pairs])["mean"]
            for pairs in pairs_of.values()
        ]
        report[name] = {
            "greatest_difference": differences[name],
            "retrieval_mean": round(float(np.mean(accuracies)), 4),
        }
    return report
