# Two commands: `make quickstart` and `make test`. Both make .venv first, from any Python 3.12 they find.
PYTHON := .venv/bin/python
export JAX_PLATFORMS ?= cpu

.PHONY: quickstart test test-slow test-aot test-aot-gpu check clean

quickstart: .venv/ready
	$(PYTHON) -m llm_jax.main --config=configs/dpo.py
	$(PYTHON) experiments/quickstart/summary.py

test: check
	$(PYTHON) -m pytest -n 2 -m "not slow and not aot and not aot_gpu"

check: .venv/dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright

test-slow: .venv/dev
	$(PYTHON) -m pytest -m "slow and not aot and not aot_gpu"

# What is compiled for a device that is not there can't be read back from the cache.
COMPILE_ONLY := JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=0 TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 \
	CUDA_VISIBLE_DEVICES=-1

# libtpu lives in an environment of its own: beside it, every start of JAX looks for a TPU.
test-aot: .venv-aot/ready
	$(COMPILE_ONLY) .venv-aot/bin/python -m pytest -s -m aot tests/training/test_memory_aot.py tests/kernels/aot

# So does the CUDA plugin.
test-aot-gpu: .venv-aot-gpu/ready
	$(COMPILE_ONLY) .venv-aot-gpu/bin/python -m pytest -s -m aot_gpu tests/kernels/aot

.venv/ready: pyproject.toml
	@sh launch/environment.sh .venv .
	@touch $@

.venv/dev: .venv/ready
	@sh launch/environment.sh .venv '.[dev]'
	@touch $@

.venv-aot/ready: pyproject.toml
	@sh launch/environment.sh .venv-aot '.[aot,test]'
	@touch $@

.venv-aot-gpu/ready: pyproject.toml
	@sh launch/environment.sh .venv-aot-gpu '.[aot-gpu,test]'
	@touch $@

clean:
	rm -rf .venv .venv-aot .venv-aot-gpu .cache runs
