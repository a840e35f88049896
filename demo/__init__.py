"""The main job on real input, from nothing to a table of before and after: `python -m demo` (or `make demo`)."""
