"""The sweeps behind `benchmarks/bench_faults.py`: real training runs under faults, one module per kind of fault."""
