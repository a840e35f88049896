"""Rank program: a student of a given size under the engine, one step, one save. Measures how long training was stopped.

large_save.py LAYERS VOCABULARY CHECKPOINTS REPORT.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from transformers import XLMRobertaConfig, XLMRobertaModel

from pipeline.runtime import dist
from pipeline.runtime.checkpoint_writer import CheckpointWriter
from pipeline.runtime.engine import StudentEngine
from pipeline.runtime.optimizer import OptimizerConfig


class Student(torch.nn.Module):
    """The encoder with a loss that reaches every parameter."""

    def __init__(self, layers: int, vocabulary: int) -> None:
        super().__init__()
        sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
        config = XLMRobertaConfig(vocab_size=vocabulary, num_hidden_layers=layers, max_position_embeddings=514, **sizes)
        self.encoder = XLMRobertaModel(config, add_pooling_layer=False)

    def forward(self, input_ids_BL: torch.Tensor) -> torch.Tensor:
        return self.encoder(input_ids_BL).last_hidden_state.square().mean()


def main(layers: int, vocabulary: int, directory: Path, report: Path) -> None:
    launch = dist.read_launch()
    dist.init_process_group(launch, 600)
    module = Student(layers, vocabulary)
    trained = dict(module.named_parameters())
    config = {
        "train_batch_size": 1,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "zero_force_ds_cpu_optimizer": False,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "steps_per_print": 2**62,
    }
    engine = StudentEngine(module, trained, OptimizerConfig(lr=1e-4), config)
    engine.backward(engine(torch.randint(4, vocabulary, (1, 16))))
    engine.step(1e-4)
    state = {"step": 1, "adam_step": 1, "scaler": {}, "parameters": engine.shapes}
    writer = CheckpointWriter(directory, {"": (engine, {"tail": torch.zeros(1)})}, launch.rank)
    began = time.monotonic()
    writer.begin({"": state})
    stopped_s = time.monotonic() - began
    while (outcome := writer.poll()) is None:
        time.sleep(0.1)
    assert outcome.problem is None, outcome.problem
    began = time.monotonic()
    engine.deepspeed_engine.save_checkpoint(str(directory / "stock"), tag="step1")
    stock_s = time.monotonic() - began
    count = sum(parameter.numel() for parameter in trained.values())
    figures = {"stopped_s": stopped_s, "total_s": outcome.seconds, "stock_s": stock_s, "parameters_m": count / 1e6}
    report.write_text(json.dumps(figures))
    dist.shut_down()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
