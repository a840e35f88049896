"""What a recipe's keys are called elsewhere: in Hugging Face's trainers, in fairseq, and in papers.

In: an unknown key of a recipe. Out: the key that has its meaning here, or None.
"""

from __future__ import annotations

import re

_STEPS = "`steps` (optimizer steps: the text is sampled by temperature, so an epoch has no length)"
OTHER_NAMES = {
    "optimizer.lr": "learning_rate max_lr peak_lr base_lr lr_peak",
    "optimizer.warmup_steps": "warmup warmup_ratio warmup_updates num_warmup_steps lr_warmup_steps",
    "optimizer.decay": "lr_scheduler lr_scheduler_type scheduler schedule lr_schedule",
    "optimizer.gradient_clipping": "max_grad_norm grad_clip clip_norm clip_grad gradient_clip_val max_norm",
    "optimizer.weight_decay": "wd l2",
    "optimizer.betas": "adam_betas adam_beta1 adam_beta2 beta1 beta2",
    "optimizer.eps": "adam_epsilon epsilon adam_eps",
    "global_batch": "batch_size train_batch_size batch total_batch_size effective_batch_size global_batch_size",
    "micro_batch_per_gpu": "per_device_train_batch_size micro_batch micro_batch_size train_micro_batch_size_per_gpu",
    "seq_len": "max_length max_seq_length max_seq_len sequence_length block_size seq_length context_length",
    "alpha": "temperature sampling_alpha sampling_temperature smoothing",
    "save_every": "save_steps checkpoint_every save_interval",
    "eval_every": "eval_steps evaluation_steps eval_interval",
    "metrics.log_every": "logging_steps log_steps log_interval",
    "metrics.loggers": "report_to logger loggers tracker",
    "checkpoint.keep": "save_total_limit keep_last max_checkpoints",
    "checkpoint.keep_best": "load_best_model_at_end metric_for_best_model",
    "stop_when.no_better_for": "early_stopping early_stopping_patience patience",
    "relations.heads": "num_relation_heads relation_heads",
    "relations.teacher_layer": "distill_layer teacher_layer_index layer",
    "student.layers": "num_hidden_layers num_layers n_layers student_layers",
    "student.hidden": "hidden_size d_model width student_hidden_size",
    "student.heads": "num_attention_heads attention_heads n_heads",
    "student.ffn": "intermediate_size ffn_dim feed_forward_size",
    "student.dropout": "hidden_dropout_prob attention_dropout",
    "student.checkpointing": "gradient_checkpointing activation_checkpointing",
    "teacher": "teacher_model teacher_model_name_or_path model_name_or_path model",
    "data": "dataset data_dir train_data dataset_name shards",
}
_ELSEWHERE = {
    "max_steps num_steps total_steps train_steps max_updates epochs num_epochs num_train_epochs": f"here it is {_STEPS}",
    "gradient_accumulation_steps accumulation grad_accum accumulate_grad_batches": (
        "it follows from `global_batch`, `micro_batch_per_gpu` and the number of GPUs"
    ),
    "fp16 bf16 precision dtype mixed_precision zero_stage zero_optimization zero": (
        "precision and ZeRO belong to the DeepSpeed JSON (`--deepspeed ds_configs/zero2_bf16.json`)"
    ),
    "output_dir run_dir save_dir out_dir": "the directory of a run is an option of the command: `--run-dir DIR`",
    "resume resume_from_checkpoint": "a run resumes by itself when its command is started again with the same `--run-dir`",
    "num_gpus gpus devices num_nodes nodes": "that is up to the launcher (`deepspeed --num_gpus N`, `slurm/distill_xlmr.sh`)",
}  # fmt: skip
_BY_NAME = {name: f"here it is `{key}`" for key, names in OTHER_NAMES.items() for name in names.split()}
_BY_NAME |= {name: advice for names, advice in _ELSEWHERE.items() for name in names.split()}


def advice_about(key: str) -> str | None:
    """What to write instead of an unknown key (without its section), if other projects have it."""
    return _BY_NAME.get(re.sub(r"[\s-]+", "_", key.strip()).lower())
