# make run   trains on the small world and writes runs/scenes/report.html
# make test  runs the test suite without the tests marked slow; make test-all runs all of it
# make lint  checks style (ruff) and the types of the core files (mypy); make format fixes what can be fixed
# Each creates .venv first if needed. The stamps in .venv carry the requirements' checksum: a changed
# file installs again, an unchanged one costs nothing, and an interrupted install is repeated.

PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist loadfile --max-worker-restart=0
CONFIG ?= configs/scenes.py
WORKDIR ?= runs/scenes

VENV := .venv
RUN_STAMP := $(VENV)/installed-run-$(shell cat requirements.txt | cksum | tr -d ' ')
TEST_STAMP := $(VENV)/installed-test-$(shell cat requirements.txt requirements-test.txt | cksum | tr -d ' ')

.PHONY: run test test-all lint format clean
.DELETE_ON_ERROR:

run: $(RUN_STAMP)
	$(VENV)/bin/python -m dsr_jax.main --config=$(CONFIG) --workdir=$(WORKDIR)

test: $(TEST_STAMP)
	$(VENV)/bin/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: $(TEST_STAMP)
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(TEST_STAMP)
	$(VENV)/bin/python -m ruff check
	$(VENV)/bin/python -m ruff format --check
	$(VENV)/bin/python -m mypy

format: $(TEST_STAMP)
	$(VENV)/bin/python -m ruff check --fix
	$(VENV)/bin/python -m ruff format

# pip marks a complete environment: `venv` installs it last.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else \
	  f"error: Python {v} is too old: 3.11 or newer is needed; run make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv --clear $(VENV)

$(RUN_STAMP): $(VENV)/bin/pip
	$(VENV)/bin/python -m pip install -r requirements.txt
	@touch $@

$(TEST_STAMP): $(VENV)/bin/pip
	$(VENV)/bin/python -m pip install -r requirements-test.txt
	@touch $@

clean:
	rm -rf $(VENV) build
