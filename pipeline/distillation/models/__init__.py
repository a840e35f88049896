"""Encoders on disk and in memory: teachers, students, and what is known about their architectures."""
