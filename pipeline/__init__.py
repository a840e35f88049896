"""Shards to student: MiniLMv2 distillation of multilingual encoders."""
