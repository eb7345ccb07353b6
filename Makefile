# Short names for the everyday commands. Everything runs in the active environment; `make install` makes .venv.
.PHONY: install lint types check test docs
PYTHON ?= python

install:
	bash -c 'source scripts/environment.sh && prepare_environment test'

lint:
	ruff check .
	ruff format --check .

types:
	mypy

# Before every commit: at most a minute on two cores.
check: lint types
	$(PYTHON) -m pytest --numprocesses 2 --dist loadfile -m "not slow and not gpu" $(FAST)

test:
	bash scripts/test.sh

docs:
	mkdocs build --strict

FAST = tests/unit/config tests/unit/mixing tests/unit/schedule tests/unit/replay tests/unit/test_layers.py \
	tests/unit/test_documents.py
