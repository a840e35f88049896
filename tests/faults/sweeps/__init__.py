"""Sweeps of `python -m tests.faults.sweeps` (`make faults`): real training runs under faults, one module per kind of fault."""
