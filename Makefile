# Every target sets up what it needs in $(VENV). Versions are pinned in constraints.txt; pip reads its own
# configuration, so an index of CPU or CUDA builds of torch is chosen with PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS.

PYTHON ?= python3
VENV   ?= .venv
DEVICE ?= cpu
# Tests run in processes of one thread each: most work on small matrices. WORKERS=0 runs them in one process.
WORKERS ?= auto
export OMP_NUM_THREADS ?= 1
DATA   ?= data
BIN    := $(VENV)/bin
PYTEST  = $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8
PIP     = $(BIN)/python -m pip install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL: # two installations into one environment would race
.PHONY: help demo test test-kernels test-slow test-gpu test-browser snippets lint types docs bench bench-large ablation ablation-full \
	paper paper-quick theories dev clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-examples ## run the quickstart; writes quickstart.png
	$(BIN)/python -m examples.gallery.quickstart

test: $(VENV)/.stamp-test ## run the fast tests and every code block of README.md and docs/; TESTS=folder for a part
	$(PYTEST) $(TESTS)

test-kernels: export ATEN_CPU_CAPABILITY = default
test-kernels: export MKL_CBWR = COMPATIBLE
test-kernels: export OMP_NUM_THREADS = 1
test-kernels: $(VENV)/.stamp-test ## the fast tests again on PyTorch's oldest CPU kernels: what another processor may round
	$(PYTEST) $(TESTS)

test-slow: $(VENV)/.stamp-test ## run the tests marked slow
	$(PYTEST) -m "slow and not gpu"

test-gpu: $(VENV)/.stamp-test ## run the tests marked gpu
	$(BIN)/python -m pytest -m gpu

test-browser: $(VENV)/.stamp-browser ## open the page of a report in a headless Chromium; skipped where there is none
	$(BIN)/python -m pytest -m browser tests/browser

snippets: $(VENV)/.stamp-test ## run every code block of README.md and docs/
	$(BIN)/python -m pytest README.md docs

lint: $(VENV)/.stamp-lint ## ruff: rules and formatting; import-linter: which package may import which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: $(VENV)/.stamp-lint ## mypy
	$(BIN)/mypy

docs: $(VENV)/.stamp-docs ## build the documentation in docs/_build; warnings are errors
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -b html docs docs/_build

bench: $(VENV)/.stamp-examples ## time the blocks and the parametric Hessian
	$(BIN)/python -m examples.benchmarks.blocks
	$(BIN)/python -m examples.benchmarks.parametric
	$(BIN)/python -m examples.benchmarks.growth

bench-large: $(VENV)/.stamp-examples ## time products and estimates on ResNet-18 and GPTs; DEVICE=cuda on a GPU
	$(BIN)/python -m examples.benchmarks.hvp --device $(DEVICE)
	$(BIN)/python -m examples.benchmarks.resnet --device $(DEVICE)
	$(BIN)/python -m examples.benchmarks.resnet --device $(DEVICE) --batch 128

ablation: $(VENV)/.stamp-ablation ## compare optimizers on small problems (minutes); writes docs/ablation.md
	$(BIN)/python -m examples.studies.ablation run examples/studies/ablation/studies/quick.toml
	$(BIN)/python -m examples.studies.ablation report

ablation-full: $(VENV)/.stamp-ablation ## the same on all problems (an hour); DATA is the folder of the data sets
	$(BIN)/python -m examples.studies.ablation run examples/studies/ablation/studies/full.toml --data $(DATA)
	$(BIN)/python -m examples.studies.ablation report

paper-quick: $(VENV)/.stamp-examples ## the paper's tables at initialisation, on generated images
	$(BIN)/python -m examples.studies.paper --quick
	$(BIN)/python -m examples.studies.paper report --results paper-results --docs paper-results

paper: $(VENV)/.stamp-examples ## the paper's tables and docs/paper.md (hours); DATA is the folder of the data sets
	$(BIN)/python -m examples.studies.paper --data $(DATA)
	$(BIN)/python -m examples.studies.paper report

theories: $(VENV)/.stamp-examples ## the three other theories, with their controls; DATA is the folder of the data sets
	$(BIN)/python -m examples.studies.theories alignment --data $(DATA)
	$(BIN)/python -m examples.studies.theories spectral_newton --data $(DATA)
	$(BIN)/python -m examples.studies.theories conservation
	$(BIN)/python -m examples.studies.theories null_cone --data $(DATA)
	$(BIN)/python -m examples.studies.theories continual --data $(DATA)

dev: $(VENV)/.stamp-dev ## install everything a developer needs, and the git hooks
	$(BIN)/pre-commit install

clean: ## remove the environment, caches and build outputs
	rm -rf $(VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: whatever follows finds it installed and cannot choose a larger build of it.
# pip is upgraded before it, since the one a new environment starts with may know neither --group nor --build-constraint.
$(VENV)/.stamp-torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch
	@touch $@

$(VENV)/.stamp-%: $(VENV)/.stamp-torch pyproject.toml
	$(PIP) --build-constraint constraints.txt $(INSTALL)
	@touch $@

$(VENV)/.stamp-examples: INSTALL = --editable ".[examples]"
$(VENV)/.stamp-ablation: INSTALL = --editable ".[ablation]"
$(VENV)/.stamp-test:     INSTALL = --editable . --group test
$(VENV)/.stamp-browser:  INSTALL = --editable ".[report]" --group browser
$(VENV)/.stamp-lint:     INSTALL = --editable ".[examples]" --group lint
$(VENV)/.stamp-docs:     INSTALL = --editable ".[docs]"
$(VENV)/.stamp-dev:      INSTALL = --editable ".[examples,docs]" --group dev
