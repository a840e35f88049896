"""The complete pipeline on real input: `python -m demo` (or `make demo`)."""
