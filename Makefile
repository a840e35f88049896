# make demo   the whole job on real text, then one table        make test   lint and every test this machine can run
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test doctor faults coverage mutants fuzz lint format clean venv
venv: .venv/.installed
.venv/.installed: requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt -r requirements-dev.txt
	touch $@

demo: venv
	$(BIN)/python -m demo $(addprefix --set ,$(SET))

# make doctor RECIPE=recipes/NAME.yaml: also that run's shards, teacher, memory and disk
doctor: venv
	$(BIN)/python -m pipeline doctor $(addprefix --recipe ,$(RECIPE))

lint: venv
	ruff check .
	ruff format --check .
	mypy
	shellcheck -x slurm/*.sh slurm/lib/*.sh slurm/site.example.env .ci/run
	codespell

format: venv
	ruff check --fix .
	ruff format .

test: venv lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# One kind of test: make test-unit, test-dist, test-faults, test-slurm, test-golden, test-e2e
test-%: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/$*

# Lines that tests/unit and tests/golden run, with what they start; KINDS="tests" for all of them.
KINDS ?= tests/unit tests/golden
coverage: venv
	coverage erase
	coverage run -m pytest -q $(KINDS)
	coverage combine --quiet
	coverage report --skip-covered --sort=cover

# Planted bugs, each caught by the test that is there for it.
mutants: venv
	$(BIN)/python -m tests.mutants

# Broken recipes, configs, manifests and data files, other ones each time, for FUZZ_SECONDS in all.
FUZZ_SECONDS ?= 600
fuzz: venv
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -q -s tests/fuzz

# Hundreds of kills, preemptions and frozen ranks, compared with a run without faults: an hour or more.
faults: venv
	$(BIN)/python -m tests.faults.sweeps

clean:
	rm -rf artifacts runs
