# Every target sets up what it needs in .venv first: on a fresh machine `make demo` or `make test` is all there is to type.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := .venv-docs
DOCS_READY := $(DOCS)/.ready
CHECKOV := .venv-checkov
CHECKOV_READY := $(CHECKOV)/.ready
PROVIDERS := .venv-providers
# Nothing to set up where the check that needs it can't run.
PROVIDERS_READY := $(if $(shell command -v terraform),$(PROVIDERS)/.ready)

# CPython 3.11 first: constraints.txt was resolved on it.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
# PYTHONWARNINGS: setuptools warns of every editable install whose folder bears the package's name, which is meant here.
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := cloudckpt backends executor tests examples docs/hooks.py

# Two workers, the tests of one class or module on one of them, in the order of their files: those with the fewest tests,
# which take longest, would come last otherwise. `make test PYTEST="tests/stores -k moto"` runs a choice.
# A worker that dies fails the run, and is not replaced: xdist can wait for ever for the tests that it had.
PYTEST ?= -n 2 --dist loadscope --no-loadscope-reorder --max-worker-restart=0

.PHONY: help
help:  ## this list
	@echo 'cloudckpt: every target does its own set-up, in $(VENV)'
	@echo
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

.PHONY: venv
venv: $(READY)  ## the environment, and nothing else

$(READY): pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { echo 'cloudckpt needs Python 3.11 or newer with its venv module. Install it, or name it: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@echo '==> environment: $(VENV), from $(PYTHON)'
	@rm -f $@
	@'$(PYTHON)' -m venv $(VENV)
	@$(PIP) install --constraint constraints.txt pip setuptools
	@echo '==> dependencies: the versions of constraints.txt (minutes, the first time)'
	@$(PIP) install --no-build-isolation --constraint constraints.txt --group dev --editable '.[all]'
	@touch $@

.PHONY: demo
demo: $(READY)  ## train, kill, resume on a real S3 server of its own, or STORE=gcs; URI=s3://bucket/prefix or file:///folder for yours
	@$(BIN)/python examples/demo/run.py $(if $(URI),--uri '$(URI)') $(if $(STORE),--store '$(STORE)')

.PHONY: test
test: $(READY)  ## every test, on real servers and real processes
	@echo '==> tests'
	@$(BIN)/pytest $(PYTEST)

# MATRIX: options, as in `make matrix MATRIX="--python 3.12 --torch 2.11.0"`; `--only oldest`, `--limit 1200`.
.PHONY: matrix
matrix:  ## a fast part of the tests on the oldest and the newest Python, torch and requirements; eight minutes at most
	@test -n '$(PYTHON)' || { echo 'matrix needs Python 3.11 or newer with its venv module: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@PYTHONPATH=tests '$(PYTHON)' -m matrix $(MATRIX)

.PHONY: soak
soak: $(READY) $(PROVIDERS_READY)  ## the long forms: thousands of random states, every version of Terraform's providers; for as long as that takes
	@echo '==> soak'
	@$(BIN)/pytest -m soak -n 2
	@$(call check_providers,--long)

# BENCH, STORAGE, RANKS, GCS, GROWTH: options, as in `make bench BENCH="--gib 4 --repeats 20"`; each module's `--help` lists them.
.PHONY: bench
bench: $(READY)  ## what saving costs training, what checksums cost, storage beside its peers, and what grows; an hour
	@PYTHONPATH=tests $(BIN)/python -m bench $(BENCH)
	@PYTHONPATH=tests $(BIN)/python -m bench.integrity
	@PYTHONPATH=tests $(BIN)/python -m bench.storage $(STORAGE)
	@PYTHONPATH=tests $(BIN)/python -m bench.ranks $(RANKS)
	@PYTHONPATH=tests $(BIN)/python -m bench.gcs $(GCS)
	@PYTHONPATH=tests $(BIN)/python -m bench.reshard
	@PYTHONPATH=tests $(BIN)/python -m bench.growth $(GROWTH)

# ONLY="conformance races" takes a choice, BENCH="--gib 2" moves more, YES=1 does not ask.
# ONLY=crashes kills saves at each of their requests, which takes a quarter of an hour.
.PHONY: live
live: $(READY)  ## conformance, interoperation, faults and a benchmark on a place of yours: URI=s3://bucket/prefix
	@test -n '$(URI)' || { echo 'live needs a place: make live URI=s3://bucket/prefix, gs://bucket/prefix or file:///folder' >&2; exit 2; }
	@PYTHONPATH=tests $(BIN)/python -m live '$(URI)' $(if $(YES),--yes) $(if $(ONLY),--only $(ONLY)) $(if $(BENCH),--bench='$(BENCH)')

# ONLY="moto Ceph" asks a choice.
.PHONY: servers
servers: $(READY)  ## ask every S3 and GCS server that is installed what it does: the tables of docs/servers.md
	@PYTHONPATH=tests $(BIN)/python -m servers $(if $(ONLY),--only $(ONLY))

.PHONY: pictures
pictures: $(READY)  ## draw what commands print on a terminal, for the docs
	@PYTHONPATH=tests $(BIN)/python -m bench.terminal

.PHONY: lint
lint: $(READY) terraform  ## format, style, types (mypy and pyright), direction of imports, and the Terraform modules
	@echo '==> ruff' && $(BIN)/ruff format --check --quiet $(SOURCES) && $(BIN)/ruff check --quiet $(SOURCES)
	@echo '==> mypy' && $(BIN)/mypy --no-error-summary
	@echo '==> pyright' && $(BIN)/pyright --warnings
	@echo '==> import-linter' && $(BIN)/lint-imports --no-cache

# Validates with the schemas of the providers, from bindings that pip downloads: the providers themselves are not needed.
define check_providers
	if [ -z '$(PROVIDERS_READY)' ]; then \
		echo '==> terraform: not installed, so the modules are not checked against the schemas of the providers'; \
	else \
		echo '==> terraform and the schemas of the providers' && PYTHONPATH=tests $(PROVIDERS)/bin/python -m terraform_check $(1); \
	fi
endef

.PHONY: terraform
terraform: $(CHECKOV_READY) $(PROVIDERS_READY)  ## the Terraform modules: format, checkov, and validity by the schemas of their providers
	@if ! command -v terraform >/dev/null; then \
		echo '==> terraform: not installed, so the format of the modules is not checked'; \
	else \
		echo '==> terraform fmt' && terraform fmt -check -diff -recursive terraform; \
	fi
	@$(call check_providers)
	@echo '==> checkov' && $(CHECKOV)/bin/checkov --directory terraform --framework terraform --compact --quiet --skip-download

.PHONY: tools
tools: $(CHECKOV_READY) $(DOCS_READY) $(PROVIDERS_READY)  ## the environments of checkov, of the site, of the check of Terraform and of `make matrix`, and nothing else
	@PYTHONPATH=tests '$(PYTHON)' -m matrix --set-up --limit 1500

$(CHECKOV_READY): terraform/checkov.txt
$(DOCS_READY): docs/requirements.txt
$(PROVIDERS)/.ready: terraform/providers.txt
# An environment for one tool, whose pins are its own.
$(CHECKOV_READY) $(DOCS_READY) $(PROVIDERS)/.ready:
	@test -n '$(PYTHON)' || { echo '$(@D) needs Python 3.11 or newer with its venv module: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@echo '==> environment: $(@D)'
	@rm -f $@
	@'$(PYTHON)' -m venv $(@D)
	@PYTHONWARNINGS=ignore $(@D)/bin/python -m pip --disable-pip-version-check --quiet install --requirement $<
	@touch $@

.PHONY: docs
docs: $(DOCS_READY)  ## the guide as a site, in build/site; a broken link fails it
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet
	@echo '==> build/site/index.html'

.PHONY: format
format: $(READY)  ## rewrite the sources as ruff wants them
	@$(BIN)/ruff check --fix --quiet $(SOURCES) || true
	@$(BIN)/ruff format $(SOURCES)

.PHONY: clean
clean:  ## remove the environment, caches and builds
	@rm -rf $(VENV) $(CHECKOV) $(DOCS) $(PROVIDERS) .venv-matrix-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
