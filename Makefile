# make sim   install into .venv, fly one simulated trial through the real ROS 2 graph, evaluate it
# make test  install into .venv, run all tests

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SEED   ?= 0
STAMP  := $(VENV)/.installed

.PHONY: help sim test trials bench colcon lint install clean

help:            ## what there is to make
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install: $(STAMP)  ## .venv with the workspace and all it needs (CPU build of torch)

$(STAMP): requirements.txt requirements-lab.txt $(wildcard src/*/setup.py)
	@echo "== installing into $(VENV): a few minutes the first time, then never again until requirements change"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'setuptools<80' wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --use-pep517 -r requirements.txt
	@$(BIN)/python -c "import torch; v = torch.version.cuda; print('torch', torch.__version__, '(CPU build)' if v is None else f'-- a CUDA {v} build: set PIP_EXTRA_INDEX_URL to the CPU wheels named on pytorch.org to save gigabytes')"
	@touch $@

sim: $(STAMP)    ## fly one simulated trial (SEED=0), evaluate its bag, write the report
	$(BIN)/deqmpc trial sim --seeds $(SEED)

trials: $(STAMP) ## 20 seeded trials in process, faster than real time
	$(BIN)/deqmpc trial sim --in-process --seeds 0:20

test: $(STAMP)   ## all tests
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

bench: $(STAMP)  ## solvers against peers from PyPI, the network, a training step
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps mpc
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/solver.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/solver.py --sweep
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/network.py --peers
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/network.py --step
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/riccati.py
	$(BIN)/python benchmarks/training_step.py

colcon: $(STAMP) ## build the workspace with colcon, as on a lab PC
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/colcon --log-base log build --base-paths src --event-handlers console_direct-

lint: $(STAMP)   ## ruff
	$(BIN)/ruff check .

clean:           ## remove what was built (keeps runs/ and .venv)
	rm -rf build install log
