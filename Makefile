# `make test` and `make demo` are all a newcomer needs; both work from a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
CORES := $(shell nproc 2>/dev/null || echo 2)
# tests and workers handle small tensors: one thread a process beats many
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= agg

.PHONY: help demo app test lab export clean
help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

# passive: threads that wait sleep; spinning, they stop each other on a machine that has other things to do
demo: runs/demo/clips/train.csv runs/demo/held_out/train.csv  ## train a tiny model on moving sprites, in minutes, on the CPU
	OMP_NUM_THREADS=$(CORES) OMP_WAIT_POLICY=passive $(BIN)/mgm pretrain --config demo

app: .venv/installed-app  ## see motion, masks and reconstructions of any video in the browser
	$(BIN)/python app/app.py --checkpoints runs/demo

# how the tests are dealt to so many processes: tests/conftest.py
test: .venv/installed-dev  ## everything that CI runs
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n $(CORES) --no-loadscope-reorder --max-worker-restart 0 --ignore tests/test_browser.py
	$(BIN)/python -m pytest tests/test_browser.py  # by itself: a browser and its server fill two cores

lab: .venv/installed-dev  ## the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

export: .venv/installed-dev  ## notebooks to mgm_nb/, cleaned
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

clean:  ## remove what is built, runs/ and .venv/ included
	rm -rf .venv runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The clips share eight backgrounds, so that a small model can know them after minutes; held-out clips
# show new objects on new ways in front of them.
runs/demo/clips/train.csv: | .venv/installed-base
	$(BIN)/mgm synth $(@D) -n 384 --backgrounds 8 --workers $(CORES)

runs/demo/held_out/train.csv: | .venv/installed-base
	$(BIN)/mgm synth $(@D) -n 64 --backgrounds 8 --seed 1 --workers $(CORES)

.venv/installed-%: settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

.venv/installed-base: settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@
