"""Evaluation tasks that fine-tune an encoder with a head: XNLI, PAWS-X, MLQA and tagging."""
