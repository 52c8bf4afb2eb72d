# Two commands: `make quickstart` and `make test`. Both make .venv first, from any Python 3.12 they find.
PYTHON := .venv/bin/python
export JAX_PLATFORMS ?= cpu

.PHONY: quickstart test test-slow test-aot test-aot-sample test-aot-gpu check clean

quickstart: .venv/ready
	$(PYTHON) -m llm_jax.main --config=configs/dpo.py
	$(PYTHON) experiments/quickstart/summary.py

test: check test-aot-sample
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

# libtpu lies in a folder that only these tests have in their path: beside it, every start of JAX looks for a TPU.
TPU_COMPILER := PYTHONPATH="$(CURDIR)/.libtpu$${PYTHONPATH:+:$$PYTHONPATH}" $(COMPILE_ONLY)

test-aot: .venv/dev .libtpu/ready
	$(TPU_COMPILER) $(PYTHON) -m pytest -s -m aot tests/training/test_memory_aot.py tests/kernels/aot

# Of these, a model's shape of each op for one of the TPUs: part of `make test`.
ifeq ($(shell uname -sm),Linux x86_64)
test-aot-sample: .venv/dev .libtpu/ready
	$(TPU_COMPILER) $(PYTHON) -m pytest -n 2 -m "aot and sample" tests/kernels/aot
else
test-aot-sample:
	@echo "not compiling kernels for TPUs: libtpu is made for Linux on x86-64 only" >&2
endif

# The CUDA plugin has many packages behind it, in an environment of their own.
test-aot-gpu: .venv-aot-gpu/ready
	$(COMPILE_ONLY) .venv-aot-gpu/bin/python -m pytest -s -m aot_gpu tests/kernels/aot

.venv/ready: pyproject.toml
	@sh launch/environment.sh .venv .
	@touch $@

.venv/dev: .venv/ready
	@sh launch/environment.sh .venv '.[dev]'
	@touch $@

.libtpu/ready: constraints.txt | .venv/ready
	@echo "installing libtpu into .libtpu" >&2
	@$(PYTHON) -m uv pip install --quiet --python $(PYTHON) --target .libtpu -c constraints.txt libtpu
	@touch $@

.venv-aot-gpu/ready: pyproject.toml
	@sh launch/environment.sh .venv-aot-gpu '.[aot-gpu,test]'
	@touch $@

clean:
	rm -rf .venv .libtpu .venv-aot-gpu .cache runs
