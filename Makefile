# Two commands for newcomers: `make quickstart` and `make test`. Everything runs in $(VENV),
# which is made and brought up to date when needed.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Test processes side by side, each with one thread: tests that start ranks of their own fork, and
# a forked OpenMP pool of more threads hangs.
TEST_JOBS ?= 2
# Options for pip when it installs torch, e.g. the index of another build:
#   make quickstart TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install -c constraints.txt
LOG := $(VENV)/install.log
KERNELS := llmtrain/ops/_cpu.so

.DEFAULT_GOAL := help
.PHONY: help install build quickstart test test-gpu bench-gpu sanitize-gpu test-cluster test-faults test-docker audit check-kernels check-cuda check format docs clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/\t/' | expand -t 14

install: $(KERNELS)  ## virtual environment with everything, and the CPU kernels
	@:

build: $(KERNELS)  ## compile the CPU kernels (needs g++ or CXX); all runs without, slower
	@:

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "llmtrain needs Python 3.11 or newer, and '$(PYTHON)' is not;" \
	    "say which one to use: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "== virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "cannot make a virtual environment; on Debian and Ubuntu:" \
	    "apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }

# torch goes in first, so that nothing else chooses it. DeepSpeed comes as source and is told not
# to compile its operators, none of which is used. mosaicml-streaming goes in last and
# without its requirements: its pins would hold numpy and transformers back (docs/install.md).
$(INSTALLED): $(BIN)/python pyproject.toml constraints.txt
	@echo "== installing; pip writes to $(LOG)"
	@{ $(PIP) $(TORCH_ARGS) torch && \
	   DS_BUILD_OPS=0 $(PIP) -e '.[dev,docs,hf,streaming,deepspeed]' && \
	   $(PIP) --no-deps mosaicml-streaming; } > $(LOG) 2>&1 || { \
	  grep -vE 'is ignored|^mosaicml-streaming .* requires|dependency resolver' $(LOG) \
	    | tail -n 25 >&2; echo "installation failed; all of it is in $(LOG)" >&2; exit 1; }
	@touch $@

# A machine without a compiler goes on with the PyTorch references.
$(KERNELS): $(INSTALLED) $(wildcard csrc/cpu/*)
	@echo "== compiling the CPU kernels"
	@$(BIN)/python -m llmtrain.ops.build || echo "going on without them: the same, slower"

quickstart: $(KERNELS)  ## prepare a corpus, train a small model on it, write the report
	@echo "== 1/3 the corpus: text that every Python installation carries"
	@$(BIN)/llmtrain data prepare configs/quickstart.yaml
	@echo "== 2/3 training"
	@$(BIN)/llmtrain train configs/quickstart.yaml
	@echo "== 3/3 report"
	@$(BIN)/llmtrain report runs/quickstart
	@echo
	@echo "config       configs/quickstart.yaml"
	@echo "corpus       data/builtin"
	@echo "run          runs/quickstart (metrics.jsonl, config.yaml, checkpoints/)"
	@echo "report       runs/quickstart/report.html (open it in a browser)"
	@echo "next         docs/quickstart.md"

test: $(KERNELS)  ## the tests that need no GPU
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not cluster" -n $(TEST_JOBS) --dist worksteal $(PYTEST_ARGS)

test-gpu: $(KERNELS)  ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

bench-gpu: $(KERNELS)  ## build, GPU tests, GPU benchmarks and sanitizer, within BUDGET seconds (780)
	@PYTHON=$(BIN)/python bash benchmarks/gpu_all.sh

sanitize-gpu: $(KERNELS)  ## the CUDA kernels under NVIDIA's compute-sanitizer
	@PYTHON=$(BIN)/python bash benchmarks/sanitize_gpu.sh

test-cluster: $(KERNELS)  ## training on a SLURM of its own (needs slurmctld, slurmd, slurm-client)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster $(PYTEST_ARGS)

check-kernels: $(KERNELS)  ## CPU kernels under sanitizers; AVX-512 and CUDA kernels emulated (minutes)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/ops/check_kernels.py

check-cuda: $(KERNELS)  ## which CUDA operators FP8 training calls, traced without a device (after build_cuda)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/ops/check_cuda.py

test-faults: $(KERNELS)  ## more than a hundred runs that are killed, and disks that fail (minutes)
	@OMP_NUM_THREADS=1 LLMTRAIN_FAULTS=110 $(BIN)/python -m pytest tests/faults -s -o timeout=1800 $(PYTEST_ARGS)

test-docker: $(INSTALLED)  ## the Dockerfile's image built and run without a daemon (root, Debian; minutes)
	@$(BIN)/python tests/launch/build_image.py $(IMAGE_ARGS)

# Torch and the others are looked up by name and version; nothing of the environment is changed.
audit: $(BIN)/python  ## known weaknesses of the pinned versions (asks PyPI; pip-audit goes to $(VENV)/audit)
	@$(BIN)/python -m venv $(VENV)/audit && $(VENV)/audit/bin/python -m pip --disable-pip-version-check install -q pip-audit
	@grep -vE '^(#|$$|torchvision==)' constraints.txt > $(VENV)/audit/pins.txt
	@$(VENV)/audit/bin/pip-audit --strict --disable-pip --no-deps -r $(VENV)/audit/pins.txt

check: $(INSTALLED)  ## lint, format, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED)  ## bring the code into shape
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(INSTALLED)  ## the documentation site, strictly, into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site
	@echo "docs: site/index.html"

clean:  ## remove caches and built files; keeps $(VENV), data/ and runs/
	@rm -rf site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	@find llmtrain tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
