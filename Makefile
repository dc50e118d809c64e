# make demo: a real model continues a real prompt through the 2-bit cache.   make test: every test that this machine can run.   make results: README tables.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test results soak clean

demo: .venv/demo.done
	$(BIN)/python -m minioscar generate smollm2-135m "The capital of France is" --raw --max-tokens 24

test: .venv/test.done
	$(BIN)/python -m minioscar pull smollm2-135m >/dev/null
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n auto --maxprocesses 4 --dist worksteal

results: .venv/test.done  # the tables and figures of README.md and docs/, from docs/results/*.json and the code's arithmetic
	$(BIN)/python -m tools.render
	$(BIN)/python -m tools.figures

soak: .venv/test.done  # 20,000 mutated inputs, then an hour of random requests in each of two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --json docs/results/soak.json

# An environment is current while it is newer than pyproject.toml.
.venv/demo.done: EXTRA = gguf
.venv/test.done: EXTRA = test
.venv/%.done: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("minioscar needs Python 3.10 or newer; try: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[$(EXTRA)]'
	@touch $@

clean:
	rm -rf .venv
