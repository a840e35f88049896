"""Encoders on disk and in memory: loading, the table of architectures, the teacher and the student."""
