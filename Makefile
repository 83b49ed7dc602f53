# Every target installs what it lacks and becomes root only for the step that needs it; bare `make` lists them.
# How: scripts/install, scripts/as-root.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

PYTHON := .venv/bin/python
DURATION ?= 20
ARGS ?=

##@ See it work
demo: ## a workload of its own, and what the agent sees of it (DURATION=20 seconds, or Ctrl-C)
	@scripts/install run
	@scripts/as-root $(PYTHON) -m lab.demo --duration $(DURATION)

run: ## the agent for this whole host, or for one subtree (CGROUP=/sys/fs/cgroup/system.slice)
	@scripts/install run
	@if [ "$(origin CGROUP)" != undefined ] && [ -z "$(CGROUP)" ]; then \
		echo "CGROUP is empty: name a cgroup, or leave CGROUP out to watch the whole host" >&2; exit 2; fi
	@$(if $(CGROUP),EBFW_CGROUP='$(CGROUP)') scripts/as-root .venv/bin/ebfw

check: ## what this kernel and host can do, and what is lost where they cannot
	@scripts/install run
	@scripts/as-root .venv/bin/ebfw check

detach: ## remove everything ebfw has in the kernel, once it has stopped or was killed (the break-glass)
	@scripts/install run
	@scripts/as-root .venv/bin/ebfw detach

##@ Prove it
test: lint ## lint, then every test that this kernel can run (ARGS="-k dns" goes to pytest)
	@echo "==> tests (pytest)"
	@scripts/as-root $(PYTHON) -m pytest tests $(ARGS)

test-unit: install-test ## only the tests that need no root
	@$(PYTHON) -m pytest tests/unit $(ARGS)

test-kernels: ## boot 5.10, 6.1 and 6.12 under QEMU and test on them
	@scripts/install run
	@echo "==> tests on other kernels (QEMU)"
	@/usr/bin/python3 tests/kernels/run.py $(ARGS)

test-compiled: install-test ## tests/unit and tests/pipeline once more, on the modules that `make wheel` compiles
	@scripts/wheel
	@echo "==> tests on compiled modules (pytest)"
	@cd build/compiled && scripts/as-root $(PYTHON) -m pytest tests/unit tests/pipeline tests/wheel.py $(ARGS)

bench: install-test ## what the compiled agent costs, as a table (BENCH_JSON=file: the same rows as JSON lines)
	@scripts/wheel
	@cd build/compiled && $(if $(BENCH_JSON),BENCH_JSON='$(abspath $(BENCH_JSON))') \
		scripts/as-root $(PYTHON) -m bench $(ARGS)

##@ Install it elsewhere
wheel: install-test ## dist/ebfw-*.whl, its hot modules compiled for this Python: for images and nodes
	@scripts/wheel

##@ Work on it
lint: install-test ## ruff, mypy --strict, import contracts
	@echo "==> ruff"
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@echo "==> mypy"
	@$(PYTHON) -m mypy
	@echo "==> import contracts"
	@.venv/bin/lint-imports --no-logo --no-cache

fmt: install-test ## format, and fix what ruff can fix
	@$(PYTHON) -m ruff check --fix-only .
	@$(PYTHON) -m ruff format .

docs: install-test ## write the tables of docs/ anew from the code, and the examples that it shows
	@$(PYTHON) -m scripts.reference

install: ## only install: what demo and run need
	@scripts/install run

install-test: ## only install: what test, lint and bench need
	@scripts/install test

clean: ## remove .venv and every cache in this checkout
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache 2>/dev/null \
		|| scripts/as-root rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache
	@find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null \
		|| scripts/as-root find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@awk 'BEGIN { FS = ":.*## "; print "ebfw: what every workload on this host talks to" } \
		/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: help demo run check detach test test-unit test-kernels test-compiled bench wheel lint fmt docs install install-test clean
