# The daily verbs. `make demo` and `make test` need nothing but Python 3.11 or newer and make .venv themselves.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
PEERS := build/peers
# pip's default build of torch for Linux carries CUDA (gigabytes). For the CPU build point PIP_EXTRA_INDEX_URL at PyTorch's
# index of CPU wheels. The version is fixed here because every other pin follows from it.
TORCH := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help venv demo test quick check schemas format bench constraints clean

help:
	@echo "make demo         cluster scikit-learn's digits, end to end, into runs/demo"
	@echo "make test         run the tests"
	@echo "make quick        run those that start no cluster and no S3 server, and are not slow"
	@echo "make check        lint, format and types"
	@echo "make bench        speed and quality beside other systems"
	@echo "make schemas      rewrite the JSON schemas in docs/ from the types in raydc/data/records.py"
	@echo "make format       rewrite the files as 'make check' wants them"
	@echo "make constraints  pin the newest set of packages into constraints.txt"
	@echo "make clean        remove .venv and all that tools leave behind; runs/ stays"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else "raydc needs Python 3.11 or newer, but $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.11" % v[:2])'
	@if [ -x $(VENV)/bin/python ]; then echo "Updating .venv"; \
	else echo "Installing into .venv (first time only, a few minutes)"; $(PYTHON) -m venv $(VENV); fi
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[cpu,dev]'
	@touch $@

demo: venv
	@$(VENV)/bin/raydc demo

test: venv
	@$(VENV)/bin/python -m pytest -q

quick: venv
	@$(VENV)/bin/python -m pytest -q -m 'not slow and not ray and not s3'

check: venv
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

schemas: venv
	@$(VENV)/bin/python -m raydc.data.json_schema docs

format: venv
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

bench: venv $(PEERS)/.installed
	@$(VENV)/bin/python -m benchmarks

# Other systems have an environment of their own, so that none of their pins reaches ours.
$(PEERS)/.installed: benchmarks/peers.txt
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install -qq --disable-pip-version-check -r benchmarks/peers.txt
	@touch $@

# Resolved in an environment of its own, so that no leftover of .venv gets pinned. "+cpu" and the like are dropped: one
# file serves the CPU and the CUDA builds of a version.
constraints:
	@rm -rf build/constraints
	@$(PYTHON) -m venv build/constraints
	@build/constraints/bin/python -m pip install -qq --disable-pip-version-check $(TORCH) -e '.[cpu,dev]'
	@build/constraints/bin/python -m pip check
	@{ echo "# The set of packages that the tests run with (Python 3.11, extras cpu and dev). Written by 'make constraints'."; \
	   build/constraints/bin/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//'; } > build/constraints.txt
	@mv build/constraints.txt constraints.txt
	@rm -rf build/constraints

clean:
	rm -rf $(VENV) build raydc.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
