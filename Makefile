# make demo: a real model continues a real prompt through the 2-bit cache, on the GPU if there is one (make demo DEVICE=cpu: never).
# make test: every test that this machine can run.   make results: README tables.
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
DEVICE ?= auto
# The extra that goes with the machine's driver, asked for where it is needed only.
CUDA = $(if $(filter cpu,$(DEVICE)),,$(shell $(PYTHON) tools/cuda_extra.py))
comma = ,

.PHONY: demo test results soak clean

demo:
	@$(MAKE) --no-print-directory $(VENV)/$(subst $() $(),-,$(strip gguf $(CUDA))).done
	$(BIN)/python -m minioscar generate smollm2-135m "The capital of France is" --raw --max-tokens 24 --device $(DEVICE)

test: $(VENV)/test.done
	$(BIN)/python -m minioscar pull smollm2-135m >/dev/null
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n auto --maxprocesses 4 --dist worksteal

results: $(VENV)/test.done  # the tables and figures of README.md and docs/, from docs/results/*.json and the code's arithmetic
	$(BIN)/python -m tools.render
	$(BIN)/python -m tools.figures

soak: $(VENV)/test.done  # 20,000 mutated inputs, an hour of random requests in each of two processes, an hour of a server
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --json docs/results/soak.json

# gguf-cuda13.done: an environment with the extras gguf and cuda13. It is current while it is newer than pyproject.toml.
$(VENV)/%.done: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("minioscar needs Python 3.10 or newer; try: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	@$(if $(findstring cuda,$*),$(PYTHON) tools/cuda_extra.py $(lastword $(subst -, ,$*)))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[$(subst -,$(comma),$*)]'
	@touch $@

clean:
	rm -rf $(VENV)
