"""Evaluation of encoders: one module per task."""
