"""XNLI: fine-tune on English sentence pairs, then evaluate zero-shot in every language.

In: encoders, XNLI in an official layout. Out: the task; see `pair_classification.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.evaluation.finetuning.labelled_pairs import PairData
from pipeline.evaluation.finetuning.pair_classification import PairConfig, pair_task
from pipeline.evaluation.finetuning.xnli_data import read_xnli


@dataclass
class XnliConfig(PairConfig):
    """Where XNLI is. The defaults of the grid are those of the paper."""


def read(config: XnliConfig) -> PairData:
    """Read all pairs that the task needs."""
    return read_xnli(config.data, config.train_language, config.languages, config.max_train, config.max_evaluation)


TASK = pair_task("XNLI", XnliConfig, read, place=40)
