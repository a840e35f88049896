"""What one GPU says about this pipeline: one command, at most ten minutes.

    python -m benchmarks.gpu_check                          (make gpu)
    python -m benchmarks.gpu_check --parts step,plan --budget 200
    python -m benchmarks.gpu_check --tiny                   the same code on a CPU, on small shapes: no figure

It prints its tables, and stores them as `benchmarks/results/DATE-gpu-NAME.md` and `.json`, NAME being the device's. The
parts (`parts.py`) run one after the other, the most important first. Each is a process with its own time limit, and each
figure is stored when it has been measured. A part that fails or runs out of time leaves its figures and the reason, and
the next part starts. What a machine or this version does not have is named in its row.

How it measures: times are medians of CUDA events after a warm-up (on a CPU, of the clock). Compare ratios of one session:
steps of one build differ by up to a tenth, and the step part repeats its first row last to show by how much.

What the modules do: `__main__` reads the options, `runner` starts the parts, `processes` ends them at their limits,
`figures` stores rows, `report` writes the tables; `setting` holds the sizes and `prepare` makes teacher, tokenizer and shards;
`timing` and `job` measure; the others are the parts. Nothing is downloaded: the teacher has XLM-R-large's shape and random
weights, the text is samples/. Only `quickstart` needs what `make demo` makes.
"""
