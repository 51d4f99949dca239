# The two commands: `make demo` and `make test`. Each makes the environment it needs, once.
#   PYTHON=python3.12 make test                    another Python (with VENV=.venv-312 beside the first)
#   TORCH=torch==2.15.0 VENV=.venv-215 make test   another torch
PYTHON ?= python3
# Not the newest: where a CPU-only build is offered (2.13.0+cpu), pip takes it, and the environment with all its tools
# takes 2.4 GB. 2.14 and 2.15 come with CUDA: 5.5 GB, of which a first test or demo uses nothing.
TORCH  ?= torch==2.13.0
VENV   ?= .venv
# The environment of test-peers: a newer torch with the libraries whose layers are fused.
PEERS_VENV ?= .venv-peers

# The kernel tests set their own numbers of threads. Everything else is small: one single-threaded worker per core is
# faster than workers whose threads wait for each other.
PYTEST_WORKERS ?= -n auto --maxprocesses=8 --dist=worksteal
# Which of the tests: core, ci (core and a quarter of the rest, chosen by the commit) or all; see tests/tiers.py.
TIER ?= core
# More arguments for pytest, as in ARGS="-k gelu".
ARGS ?=

BENCH ?= --problem senet154 --batch 8 --device cpu --json build/bench.json --plot build/bench.png

# Other tests for sanitize than its own, or a subset of those: SANITIZE=subset.
SELECT   ?=
SANITIZE ?= all

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install -q

.DEFAULT_GOAL := help
.PHONY: help env build test test-all test-peers demo bench lint abi aot sanitize contracted wheel sdist clean distclean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 13

# One stamp for the torch that is installed, named after it: another TORCH is another stamp.
torch_stamp := $(VENV)/.torch-$(shell printf %s '$(TORCH)' | tr -c 'A-Za-z0-9.+' '-')
# Two more: what compiling and running the package needs, and what tests and lint need in addition.
runs := $(VENV)/.installed-to-run
installed := $(VENV)/.installed

$(PY):
	$(PYTHON) -m venv $(VENV)

$(torch_stamp): | $(PY)
	$(PIP) '$(TORCH)'
	@rm -f $(VENV)/.torch-*
	@touch $@

# Without the extensions, which `build` compiles: once, and into the checkout.
$(runs): $(torch_stamp) pyproject.toml setup.py
	$(PIP) 'setuptools>=77' ninja 'pybind11>=2.13'
	SENET_FUSED_NO_EXT=1 $(PIP) --no-build-isolation -e '.[bench,demo]'
	@touch $@

$(installed): $(runs)
	SENET_FUSED_NO_EXT=1 $(PIP) --no-build-isolation -e '.[bench,demo,train,test,lint]'
	@touch $@

env: $(installed) ## make .venv and install torch, the tools and this package (editable, not compiled)

# Without CUDA where there is no GPU, because nvcc takes four fifths of the time; pip and wheels include it wherever
# nvcc is found. Tests that read its machine code compile it themselves.
build: $(runs) ## compile what changed, into the checkout
	SENET_FUSED_CUDA=$${SENET_FUSED_CUDA:-gpu} $(PY) setup.py -q build_ext --inplace

test: build $(installed) ## run the core tests (ARGS="-k gelu" passes arguments on; TIER=ci|all)
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_WORKERS) --tier $(TIER) $(ARGS)

test-all: TIER := all
test-all: test ## run all tests

# One build serves both torches, so this environment has the checkout on its path instead of a build of its own.
peers_installed := $(PEERS_VENV)/.installed

$(peers_installed): $(wildcard tests/peers/requirements*.txt)
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install -q -r tests/peers/requirements.txt
	$(PEERS_VENV)/bin/python -m pip install -q --no-deps -r tests/peers/requirements-no-deps.txt
	@touch $@

test-peers: build $(peers_installed) ## fuse against timm, torchvision, MONAI, transformers and others (6.3 GB)
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(PEERS_VENV)/bin/python -m pytest $(PYTEST_WORKERS) tests/peers $(ARGS)

demo: build ## train a small SE-ResNet with the plain layer, the fused one and fused block tails, and compare
	$(VENV)/bin/senet-fused demo $(ARGS)

bench: build ## the microbenchmark (BENCH="..." are its options)
	@mkdir -p build
	$(VENV)/bin/senet-fused bench $(BENCH)

lint: $(installed) ## ruff, mypy over the public names, clang-format, shell syntax
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror
	bash -n .ci/run benchmarks/gpu_check.sh tests/sanitize/run.sh

abi: build ## check that the library uses only LibTorch's stable ABI of the oldest supported torch
	$(PY) tests/abi/stable_abi.py

aot: build $(installed) ## recompile the GPU kernels and record their resources; git diff shows what has changed
	$(PY) tests/cuda_aot/resources.py --write
	$(PY) tests/triton_aot/compile.py --write

sanitize: $(installed) ## the kernel tests under AddressSanitizer and UBSan (SANITIZE=subset: some of them)
	PYTHON=$(PY) SANITIZE=$(SANITIZE) bash tests/sanitize/run.sh $(SELECT) $(ARGS)

# nvcc contracts; g++ does so from -O2 on.
contracted: build ## the CUDA kernels on the host with fused multiply-adds, against the error rule
	SENET_HOST_CXXFLAGS="-O2 -mfma -ffp-contract=fast" OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_WORKERS) \
	    tests/test_cuda_kernels.py tests/test_cuda_tail.py $(ARGS)

wheel: $(runs) ## a wheel for this Python, in dist/
	$(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

sdist: $(runs) ## a source archive, in dist/
	$(PY) setup.py -q sdist

clean: ## remove what was built
	rm -rf build dist *.egg-info senet_fused/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find senet_fused tests benchmarks buildtools -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## and the environments
	rm -rf $(VENV) $(PEERS_VENV)
