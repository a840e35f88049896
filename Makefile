# `make` or `make help` lists the targets. Every target that needs it makes .venv first.
# Only a PYTHON that is named here (make venv PYTHON=python3.12) replaces a .venv of another version. One of the environment makes
# a .venv where there is none.
NAMED_PYTHON := $(if $(filter command,$(origin PYTHON)),$(PYTHON))
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
.DEFAULT_GOAL := help

.PHONY: always help venv demo doctor gpu docs docs-serve test test-all loggers test-versions lint format coverage mutants fuzz faults screenshots clean clean-runs
help: ## list the targets
	@sed -n 's/^\([a-z%-]*\):[^#]*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "make %-13s %s\n", $$1, $$2 }'

venv: .venv/.installed ## make .venv and install the packages that demo and tests need
.venv/.installed: requirements.txt requirements-dev.txt $(if $(NAMED_PYTHON),always)
	./install.sh $(NAMED_PYTHON)

demo: venv ## distil a student of a real teacher on sample text, and print a table of results (SET="key=value ..." for settings, MINILMV2_VERBOSE=1 for all messages)
	$(BIN)/python -m demo $(addprefix --set ,$(SET))

doctor: venv ## check this machine, and with RECIPE=recipes/NAME.yaml that run's shards, teacher, memory and disk
	$(BIN)/python -m pipeline doctor $(addprefix --recipe ,$(RECIPE))

gpu: venv ## measure one NVIDIA GPU in at most ten minutes; tables go to benchmarks/results/ (OPTIONS="--parts step,plan")
	$(BIN)/python -m benchmarks.gpu_check $(OPTIONS)

test: venv lint ## lint, and run the tests that this machine can run, without the long ones of tests/dist
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long"

test-all: venv lint ## lint, and run all tests: a quarter of an hour more
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-%: venv ## run the tests of one directory: make test-unit, test-dist, test-faults, test-slurm, test-golden, test-e2e
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/$*

loggers: venv .loggers/.installed ## make .loggers, an environment with wandb, trackio and mlflow, which the tests of `metrics.loggers` need
.loggers/.installed: requirements-loggers.txt
	$(BIN)/python -m venv .loggers
	.loggers/bin/python -m pip install -q -r requirements-loggers.txt
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$(.loggers/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/zz-main.pth
	touch $@

docs: .docs-venv/.installed ## build the documentation as a site; open site/index.html
	NO_MKDOCS_2_WARNING=1 .docs-venv/bin/python -m mkdocs build --strict
	@echo "The site is in $(CURDIR)/site: open site/index.html"

docs-serve: .docs-venv/.installed ## show the documentation on http://127.0.0.1:8000, and again after every change
	NO_MKDOCS_2_WARNING=1 .docs-venv/bin/python -m mkdocs serve

.docs-venv/.installed: requirements-docs.txt
	@{ $(or $(PYTHON),python3) -m venv .docs-venv && \
	.docs-venv/bin/python -m pip install --disable-pip-version-check -q -r requirements-docs.txt && touch $@; } || \
	{ printf 'error: the packages of requirements-docs.txt could not be installed in .docs-venv (messages are above).\n%s\n' \
	"fix: name a Python from 3.11 on with its module venv (make docs PYTHON=python3.11), or run the same command again with a network" >&2; exit 2; }

test-versions: venv ## run unit, golden, dist and e2e tests in the environments of tests/versions/rows.toml (ROWS="oldest newest": only these)
	$(BIN)/python -m tests.versions $(addprefix --row ,$(ROWS))

lint: venv ## check format, types, shell scripts and spelling
	ruff check .
	ruff format --check .
	mypy
	shellcheck -x install.sh slurm/*.sh slurm/lib/*.sh slurm/site.example.env .ci/run
	hadolint containers/Dockerfile
	codespell

format: venv ## format the code, and fix what ruff can fix
	ruff check --fix .
	ruff format .

KINDS ?= tests/unit tests/golden
coverage: venv ## report the lines that KINDS (default: tests/unit tests/golden) run, subprocesses included
	coverage erase
	coverage run -m pytest -q $(KINDS)
	coverage combine --quiet
	coverage report --skip-covered --sort=cover

mutants: venv ## plant bugs, and check that the test for each of them fails
	$(BIN)/python -m tests.mutants

FUZZ_SECONDS ?= 600
fuzz: venv ## read broken recipes, configs, manifests and data, new ones each time, for FUZZ_SECONDS (default: 600)
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -q -s tests/fuzz

faults: venv ## disturb runs with hundreds of kills, preemptions and frozen ranks: an hour or more
	$(BIN)/python -m tests.faults.sweeps

RUN ?= runs/quickstart
screenshots: venv ## take the pictures of docs/images in a headless browser, of the report and the curves of RUN (default: runs/quickstart)
	$(BIN)/python -m tests.screenshots $(RUN)

clean: ## delete the caches of tests, linters and Python
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* build site *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -not -path './.versions/*' -not -path './.loggers/*' -not -path './.docs-venv/*' -prune -exec rm -rf {} +

clean-runs: ## delete artifacts/ and runs/ with all trained students, after a question (SURE=yes: without it)
	@du -sh artifacts runs 2>/dev/null || true
	@if [ "$(SURE)" = yes ]; then answer=yes; else printf 'Delete artifacts/ and runs/ with all trained students? Type yes: '; read -r answer; fi; \
	if [ "$$answer" = yes ]; then rm -rf artifacts runs && echo deleted; else echo 'Nothing is deleted.'; exit 2; fi
