# Two commands: `make quickstart` and `make test`. Both make .venv first, from any Python 3.12 they find.
PYTHON := .venv/bin/python
export JAX_PLATFORMS ?= cpu

.PHONY: quickstart test test-slow test-aot check clean

quickstart: .venv/ready
	$(PYTHON) -m llm_jax.main --config=configs/dpo.py
	$(PYTHON) experiments/quickstart/summary.py

test: check
	$(PYTHON) -m pytest -n 2 -m "not slow and not aot"

check: .venv/dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright

test-slow: .venv/dev
	$(PYTHON) -m pytest -m slow

# libtpu lives in an environment of its own: beside it, every start of JAX looks for a TPU.
test-aot: .venv-aot/ready
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 .venv-aot/bin/python -m pytest -s -m aot tests/training/test_memory_aot.py

.venv/ready: pyproject.toml
	@sh launch/environment.sh .venv .
	@touch $@

.venv/dev: .venv/ready
	@sh launch/environment.sh .venv '.[dev]'
	@touch $@

.venv-aot/ready: pyproject.toml
	@sh launch/environment.sh .venv-aot '.[aot,test]'
	@touch $@

clean:
	rm -rf .venv .venv-aot .cache runs
