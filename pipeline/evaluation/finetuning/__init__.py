"""Evaluation tasks that fine-tune an encoder with a head: XNLI and MLQA."""
