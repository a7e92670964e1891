# The commands of this project. `make help` lists them.

VENV ?= .venv
PYTHON ?= python3
# What is installed as torch. Without a GPU driver the pin takes a CPU build where pip's index offers one; for a chosen
# CUDA build: make venv TORCH="torch==2.13.0 --index-url URL_OF_THE_BUILD"
TORCH ?= torch==2.13.0
# What `make gpu-check` installs beside it; empty leaves Transformer Engine out. Where no wheel of it fits this torch and
# Python it is compiled, which takes g++ and Python's headers.
TE ?= transformer-engine[pytorch]

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-all lint types golden bench bench-more gpu-check

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(VENV)/.installed ## create .venv with this package in it, versions as in constraints.txt

# torch goes first and alone, so that no other package's range decides which build of it comes. The copy of the
# constraints holds the torch that was installed, which may be another than the pin (TORCH above).
$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make venv needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1); name another: make venv PYTHON=python3.11"; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot create virtual environments; install its venv module (Debian: python3-venv)"; exit 1; }
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PIP) install --quiet $(TORCH)
	@{ grep -v '^torch==' constraints.txt; $(PIP) freeze | grep '^torch=='; } > $(VENV)/constraints.txt
	$(PIP) install --quiet -c $(VENV)/constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) install --quiet -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

quickstart: ## install, then SFT -> DPO -> reward model -> RTO on real data, 2 ranks, CPU
	@start=$$(date +%s) && $(MAKE) --no-print-directory venv && \
	  PATH="$(abspath $(VENV))/bin:$$PATH" bash examples/quickstart/run.sh && \
	  echo "quickstart took $$(( $$(date +%s) - start )) seconds, install included"

# Files side by side: most of a test of several ranks is waiting, for processes to start and for one another.
WORKERS ?= 2

test: $(VENV)/.dev ## the suite, without the slow tests
	$(PY) -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist loadfile

# The slow tests one at a time: some of them measure time.
test-all: test ## the suite with the slow tests
	$(PY) -m pytest -m "slow and not gpu"

lint: $(VENV)/.dev ## style and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev ## type check
	$(VENV)/bin/pyright --pythonpath $(PY)

golden: $(VENV)/.installed ## our formulas against the numbers of the paper's own code
	$(PY) tools/check_golden.py tests/golden

$(VENV)/.bench: $(VENV)/.installed
	$(PIP) install --quiet -c $(VENV)/constraints.txt -e '.[bench]'
	@touch $@

# Models are made once for the benchmarks that share them.
BENCH_INPUTS := $(or $(TMPDIR),/tmp)/rto_megatron-bench-$(shell id -u)

bench: $(VENV)/.bench ## ours beside TRL, the paper's loop and transformers; share of the matmul peak (about 13 minutes)
	rm -rf $(BENCH_INPUTS)
	$(PY) -m benchmarks.trl_ppo --models 1M --inputs $(BENCH_INPUTS)
	$(PY) -m benchmarks.paper_loop --inputs $(BENCH_INPUTS)
	$(PY) -m benchmarks.throughput
	$(PY) -m benchmarks.decode

bench-more: $(VENV)/.bench ## one setting at a time; cost against tokens, size and ranks; what schedule and packing cost
	$(PY) -m benchmarks.trl_ppo --models 8M --inputs $(BENCH_INPUTS)
	$(PY) -m benchmarks.ablation --inputs $(BENCH_INPUTS)
	$(PY) -m benchmarks.scaling --inputs $(BENCH_INPUTS)
	$(PY) -m benchmarks.packing
	$(PY) -m benchmarks.decode_blocks
	$(PY) -m benchmarks.event_loop
	$(PY) -m benchmarks.schedule_maps

# Its setup asks which torch is there, so it must see the one of this environment.
$(VENV)/.gpu: $(VENV)/.dev
	@$(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
	  echo "make gpu-check needs an NVIDIA GPU that torch can use, and $$($(PY) -c 'import torch; print(torch.__version__)') sees none: look at nvidia-smi, or name a CUDA build with TORCH=... and a fresh VENV=..."; exit 1; }
	$(PIP) install --quiet -c $(VENV)/constraints.txt setuptools wheel ninja packaging pybind11
	$(if $(TE),$(PIP) install --no-build-isolation -c $(VENV)/constraints.txt '$(TE)' || { \
	  echo "Transformer Engine could not be installed; 'make gpu-check TE=' goes on without its layers and 8 bits"; exit 1; })
	@touch $@

# Both parts, whatever the first one finds. Third parties' warnings are shown, as nobody has seen those of a GPU yet.
gpu-check: $(VENV)/.gpu $(VENV)/.bench ## what needs an NVIDIA GPU: tests/gpu, then a step, training and decoding measured (goals in the file)
	$(PY) -m pytest -m gpu tests/gpu -rs -W default; tests=$$?; \
	  $(PY) -m benchmarks.gpu_step && exit $$tests
