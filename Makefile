# make demo: the main job, end to end, on this machine's CPU.   make test: the tests.   make test-fast: those to run while working.
# make test-all: with more cases of the same, for five minutes more.
# make numerics: what packed caches and FP8 cost in accuracy, measured anew (docs/numerics.md; about 25 minutes).
# make gpu-check: everything that needs a GPU, checked and measured (docs/gpu.md). They set themselves up in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
NPM := tests/clients/npm
EXAMPLE := examples/tiny-deepseek-v2
DEMO := demo
JOBS ?= 2

.PHONY: demo test test-all test-fast clients kernels numerics gpu-check lint clean

demo: $(VENV)/installed
	@$(BIN)/python examples/demo.py --checkpoint $(EXAMPLE) --out $(DEMO)

test: $(VENV)/installed clients
	$(BIN)/python -m pytest -n $(JOBS) -m "not deep"

test-all: $(VENV)/installed clients
	$(BIN)/python -m pytest -n $(JOBS)

test-fast: $(VENV)/installed
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not deep"

# Other people's clients of the server, from PyPI and npm; without them (no room, no network, no npm) their tests skip and say so.
clients:
	-@$(MAKE) --no-print-directory $(CLIENTS)/installed
	-@command -v npm > /dev/null && $(MAKE) --no-print-directory $(NPM)/node_modules/installed

kernels: $(VENV)/installed
	$(BIN)/python -m latentrt kernels --all

numerics: $(VENV)/installed
	$(BIN)/python -m benchmarks.cache_numerics --windows 10
	$(BIN)/python -m benchmarks.cache_evidence
	$(BIN)/python -m benchmarks.fp8_numerics

gpu-check: $(VENV)/installed
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .

clean:
	rm -rf $(DEMO) .pytest_cache .hypothesis .ruff_cache

$(VENV)/installed: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, found " + sys.version'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(CLIENTS)/installed: requirements-clients.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements-clients.txt
	@touch $@

$(NPM)/node_modules/installed: $(NPM)/package-lock.json
	npm ci --prefix $(NPM) --ignore-scripts --no-audit --no-fund --silent
	@touch $@
