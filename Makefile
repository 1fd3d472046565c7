# Thin: every target only prepares .venv and calls one command that also works in an environment of your own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART_DIR := runs/quickstart
# Python keeps what it compiled, whatever the shell says: without, each of the tests' processes takes 20 s to start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-fast lint clean

quickstart: $(VENV)/.installed  ## install, train the quickstart recipe, write and name its report
	$(BIN)/python -m omnitrain fit +recipe=quickstart paths.run_dir=$(QUICKSTART_DIR) ckpt_path=last

test: $(VENV)/.installed-dev lint  ## everything that CI checks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2
	# A file at a time in one worker: its tests share a run, or a Slurm.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile

test-fast: $(VENV)/.installed-dev lint  ## without the longest: ten kills, notebooks, the wheel
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --exclude docs .
	$(BIN)/ty check omnitrain
	$(BIN)/lint-imports

# uv finds a torch, torchvision and torchaudio that fit each other; plain pip may not (README, "Installation").
$(VENV)/bin/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade uv

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/uv
	$(BIN)/uv pip install --python $(BIN)/python --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/uv
	$(BIN)/uv pip install --python $(BIN)/python --editable ".[dev,sweeps,prep,eval,lm_eval,lora,post,tools]"
	touch $@ $(VENV)/.installed

clean:  ## remove the environment and caches (runs stay)
	rm -rf $(VENV) .pytest_cache .ruff_cache dist
