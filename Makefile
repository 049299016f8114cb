# One command each: quickstart, test, check, reliability, sanitize, interop, lm-eval, bench, gpu. Each makes what it
# needs and remembers it, so the second call starts at once. Nothing is needed beforehand but a Python 3.11 or newer.
#
#   PYTHON=python3.12   which interpreter makes the environment (and runs `gpu`)
#   VENV=.venv          where the environment is
#   TORCH=torch==2.13.0 which torch is installed, before everything else
#   QQUANT_NATIVE=auto  0: build no native module; 1: fail if one cannot be built
#   WORKERS=2           how many processes share the tests and the check of types, up to 1 GB of memory each; 0: one

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
WORKERS ?= 2
OUT ?= gpu-out

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q -q
STAMP := $(VENV)/.stamp

.DEFAULT_GOAL := help
.PHONY: help install quickstart test check format reliability sanitize interop lm-eval bench gpu clean

help:
	@echo "make quickstart   quantize and evaluate the example model, and say where the report is"
	@echo "make install      only the environment, with qquant in it"
	@echo "make test         run the tests"
	@echo "make check        lint, formatting, types"
	@echo "make format       let ruff repair what it can"
	@echo "make reliability  kill, starve and mislead it thousands of times, and write docs/reliability.md: 45 minutes"
	@echo "make sanitize     run the CPU kernels under address and undefined-behaviour sanitizers"
	@echo "make interop      exchange checkpoints with other GPTQ tools, in an environment of its own"
	@echo "make lm-eval      compare every decision with lm-evaluation-harness, in an environment of its own"
	@echo "make bench        run the CPU benchmarks"
	@echo "make gpu          GPU tests and benchmarks on a machine that has torch and a GPU"
	@echo "make clean        remove environments and built files"

$(STAMP)-venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and f"qquant needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}; set PYTHON=")'
	@test -x $(PY) || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@touch $@

$(STAMP)-torch-$(TORCH): | $(STAMP)-venv
	@echo "installing $(TORCH)"
	@$(PIP) install "$(TORCH)"
	@touch $@

$(STAMP)-base: requirements/base.txt $(STAMP)-torch-$(TORCH)
	@echo "installing requirements/base.txt"
	@$(PIP) install -r requirements/base.txt
	@touch $@

$(STAMP)-dev: requirements/dev.txt $(STAMP)-base
	@echo "installing requirements/dev.txt"
	@$(PIP) install -r requirements/dev.txt
	@touch $@

$(STAMP)-vocabulary: requirements/vocabulary.txt $(STAMP)-base
	@echo "installing requirements/vocabulary.txt"
	@$(PIP) install --no-deps -r requirements/vocabulary.txt
	@touch $@

$(STAMP)-package: pyproject.toml setup.py build_cuda.py $(wildcard qquant/csrc/* qquant/csrc/*/*) $(STAMP)-base
	@echo "installing qquant"
	@$(PIP) install --no-build-isolation --no-deps -e .
	@$(PY) -c 'from qquant import _native; [print(f"{name}: {why}; see qquant doctor") for name, live, why in _native.status() if not live]'
	@touch $@

install: $(STAMP)-package

quickstart: $(STAMP)-package
	@$(PY) examples/quickstart.py

# A file's tests stay in one process, since they share models and compiled programs; files go out in their order, so
# that the short ones at the end even out what the long ones took.
test: $(STAMP)-package $(STAMP)-dev $(STAMP)-vocabulary
	$(PY) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: $(STAMP)-package $(STAMP)-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --num-workers $(WORKERS)

format: $(STAMP)-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

reliability: $(STAMP)-package $(STAMP)-dev $(STAMP)-vocabulary
	QQUANT_RELIABILITY_RECORD=docs/reliability.md $(PY) -m pytest -q -n $(WORKERS) --dist worksteal \
		-m "reliability or not reliability" tests/reliability $(PYTEST_ARGS)

sanitize: $(STAMP)-package $(STAMP)-dev
	$(PY) -m pytest -q tests/test_linear_sanitized.py tests/test_step_sanitized.py tests/test_pack_sanitized.py

interop: $(STAMP)-package
	QQUANT_PYTHON="$(PY)" bash tests/interop/run.sh

lm-eval: $(STAMP)-package
	QQUANT_PYTHON="$(PY)" bash tests/lm_eval/run.sh

bench: $(STAMP)-package
	$(PY) benchmarks/bench_kv_decode.py --quick
	$(PY) benchmarks/bench_linear.py --quick
	$(PY) benchmarks/bench_decode.py --quick
	@for file in benchmarks/bench_vs_gptqmodel.py benchmarks/bench_large.py; do echo "== $$file"; $(PY) $$file || exit 1; done

# Uses the machine's own torch, so it installs nothing. Every GPU benchmark is benchmarks/gpu_*.py and takes --out FILE.
gpu: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu:
	@$(PYTHON) -c 'import importlib.util as u, sys; missing = [m for m in "torch transformers accelerate safetensors pydantic typer rich psutil tiktoken jinja2 pytest hypothesis peft".split() if not u.find_spec(m)]; sys.exit(f"make gpu uses the packages of $(PYTHON) and does not find {missing}; set PYTHON=, or PYTHONPATH= to a folder that they were installed into with pip --target" if missing else 0)'
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make gpu needs a CUDA device, and torch " + torch.__version__ + " sees none")'
	@mkdir -p "$(OUT)"
	$(PYTHON) setup.py -q build_ext --inplace
	QQUANT_TEST_JSON="$(OUT)/tests-gpu.json" $(PYTHON) -m pytest -q -m gpu $(PYTEST_ARGS) || test $$? -eq 5
	@for file in $(wildcard benchmarks/gpu_*.py); do \
		echo "== $$file"; $(PYTHON) $$file --out "$(OUT)/$$(basename $$file .py).json" || exit 1; done

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info quickstart-out .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find qquant -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
