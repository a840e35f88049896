r"""Distil with the Trainer of transformers: relation losses in `compute_loss`. In: lines of text. Out: a student for `AutoModel`.

python examples/with_trainer.py --output_dir runs/trainer --max_steps 100
torchrun --nproc-per-node 2 examples/with_trainer.py --output_dir runs/trainer --teacher intfloat/multilingual-e5-base \
    --text 'text/*.txt' --hidden 384 --init random --bf16 true --per_device_train_batch_size 64 \
    --gradient_accumulation_steps 2 --max_steps 100000 --learning_rate 5e-4 --lr_scheduler_type linear --warmup_steps 2000 \
    --dataloader_num_workers 4 --eval_strategy steps --eval_steps 1000 --save_steps 5000

All options of `transformers.TrainingArguments` work. Two processes on a machine without GPU: --use_cpu true --ddp_backend gloo.
The pipeline's own training (`deepspeed pipeline/train.py`) has in addition: ZeRO, shards sampled by language, bitwise resume.
"""

from __future__ import annotations

import glob
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from safetensors.torch import load_file
from transformers import (
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

if __name__ == "__main__":  # run in a checkout: its packages are one level up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from minilmv2 import build_student, load_encoder, relation_kl, tap
from pipeline.distillation.models.loading import load_tokenizer
from pipeline.distillation.models.student import Student, StudentConfig
from pipeline.errors import UserError, exit_code_of


@dataclass
class Distillation:
    """What is distilled, next to the `TrainingArguments`. The defaults are the teacher and text of `make demo`."""

    teacher: str = "artifacts/teacher"
    text: str = "samples/cc100/*.txt.xz"  # files with one text per line
    max_length: int = 128  # tokens of a text
    heldout: int = 64  # texts that are not trained on
    layers: int = 6
    hidden: int = 384
    heads: int = 12  # attention heads of the student
    init: str = "layers"  # every n-th layer of the teacher; of a narrower student: random, or project
    relation_heads: int = 48  # must divide both widths


class DistillationTrainer(Trainer):
    """A Trainer whose model is `student.tapped`: the layers up to the queries, keys and values that are compared."""

    def __init__(self, teacher: PreTrainedModel, student: Student, relation_heads: int, **options) -> None:
        super().__init__(student.tapped, **options)
        if self.args.n_gpu > 1:  # the Trainer would copy the model to all GPUs in every step
            raise UserError(
                "one process sees several GPUs. Start one process for each: torchrun --nproc-per-node "
                f"{self.args.n_gpu} {' '.join(sys.argv)}"
            )
        self.student, self.relation_heads = student, relation_heads
        self.teacher = tap(teacher, teacher.config.num_hidden_layers).requires_grad_(False).eval().to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over the texts of the relation losses of Q-Q, K-K and V-V."""
        ids_BL, mask_BL = inputs["input_ids"], inputs["attention_mask"]
        with torch.no_grad(), self.accelerator.autocast():
            of_teacher = self.teacher(ids_BL, mask_BL)
        of_student = model(ids_BL, mask_BL)  # has its own autocast
        lengths_B = mask_BL.sum(dim=1).cpu()
        pairs = zip(of_teacher, of_student, strict=True)
        loss = sum(relation_kl(t_BLD, s_BLd, self.relation_heads, lengths_B) for t_BLD, s_BLd in pairs)
        return (loss, of_student) if return_outputs else loss

    def training_step(self, model, *arguments, **options):
        """Forward and backward of a batch. Raises `UserError` where each process would train a student of its own."""
        if model is self.student.tapped and self.args.world_size > 1:
            raise UserError(
                "the model is not in DistributedDataParallel, so gradients would not be averaged: transformers leaves out a model "
                "that was evaluated before `train`. Evaluate it there: --eval_on_start true"
            )
        return super().training_step(model, *arguments, **options)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of a held-out batch."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss, None, None

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        """Save the complete student, with the parts above the tap. Checkpoints have the same files."""
        if self.args.should_save:
            self.student.model.save_pretrained(output_dir or self.args.output_dir)
            self.processing_class.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Load what `save_model` saved: the tap has the same parameters, under other names."""
        self.student.model.load_state_dict(load_file(Path(resume_from_checkpoint) / "model.safetensors"))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def read_text(options: Distillation, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
    """The lines for training and those that are held out. They are tokenised when they are read."""
    files = sorted(glob.glob(options.text))  # noqa: PTH207 (Path.glob has no absolute patterns)
    if not files:
        raise UserError(f"no file is called {options.text}. Name files with one text per line: --text 'DIR/*.txt'")
    lines = load_dataset("text", data_files=files, split="train").filter(lambda row: bool(row["text"].strip()))
    if len(lines) <= options.heldout:
        raise UserError(
            f"{options.text} has {len(lines)} lines with text, and {options.heldout} are held out. Set --heldout lower"
        )
    lines.set_transform(lambda rows: tokenizer(rows["text"], truncation=True, max_length=options.max_length))
    parts = lines.train_test_split(test_size=options.heldout, seed=0)
    return parts["train"], parts["test"]


def main() -> None:
    options, arguments = HfArgumentParser((Distillation, TrainingArguments)).parse_args_into_dataclasses()
    arguments.remove_unused_columns = False  # the columns are those of the tokenizer
    arguments.eval_on_start = True
    arguments.ddp_find_unused_parameters = False  # a tap has none
    tokenizer = load_tokenizer(options.teacher)
    tokenizer.padding_side = "right"  # where `relation_kl` expects it
    teacher = load_encoder(options.teacher)
    shape = StudentConfig(options.layers, options.hidden, options.heads, init=options.init)
    student = build_student(teacher, shape, arguments.seed)
    with arguments.main_process_first():  # the others read its cache
        training, heldout = read_text(options, tokenizer)
    trainer = DistillationTrainer(
        teacher,
        student,
        options.relation_heads,
        args=arguments,
        train_dataset=training,
        eval_dataset=heldout,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    if trainer.is_world_process_zero():
        before = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
        print(f"held-out loss {before:.4f} -> {after:.4f}; student: {arguments.output_dir}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
