# Everything a developer or CI runs. The first target that needs it makes .venv from the lock; .venv belongs to make.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet
# The newest with a build for the CPU alone beside it on PyPI; the others bring several GB for GPUs.
TORCH := torch==2.13.0 transformers==5.23.0
# Carries CLIP's vocabulary; its code is not run.
VOCABULARY := clip-anytorch==2.6.0
# Carries its trained encoders; nothing of it is installed.
GEOCLIP := geoclip==1.2.0
# Beside the locked environment: it holds Pillow under 13 and pyarrow under 26.
BEAM := apache-beam==2.77.0
# A browser's driver and its audit, fuzzers, and what makes pages of the documentation and of the notebook.
TOOLS := playwright==1.65.2 axe-playwright-python==0.1.8 schemathesis==4.32.5 atheris==3.0.0 \
  mkdocs-material==9.8.2 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11 nbclient==0.11.0 ipykernel==7.4.0
# Compiles for TPUs; the version that jax[tpu] of the lock asks for.
LIBTPU := libtpu==0.0.42.1
# Pyright's wheel would ask for newer versions of itself over the network.
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

# What jax2onnx and TensorFlow need excludes what we need: each has an environment of its own.
PACKAGES = $$($(BIN)/python -c 'from geotoken_jax.interop.targets import TARGETS; print(TARGETS["$(1)"][1])')

.PHONY: help demo test test-slow test-interop test-tools test-targets docs lint bench lock clean

help: ## say what each target does
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

demo: $(INSTALLED) ## the whole path on the embedded photos, then a report to open in a browser
	$(BIN)/geotoken all --config=configs/demo.py --workdir=runs/demo
	@echo "The report: $(CURDIR)/runs/demo/report/index.html"

# A worker that dies is not replaced: with loadfile the rest would wait for it forever. Files keep the order that
# tests/conftest.py gives them, the longest first; by itself xdist would begin with those that have most tests.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

test: $(INSTALLED) ## the tests
	$(PYTEST) tests --ignore=tests/tools

# SLURM's tests are skipped where it is not installed (apt-get install slurm-wlm munge).
test-slow: $(INSTALLED) .tpu/.installed ## more kills, SLURM, and a compiler for TPUs that are not here (.tpu, 700 MB)
	PYTHONPATH=$(CURDIR)/.tpu $(PYTEST) -m slow tests --ignore=tests/tools

.tpu/.installed:
	@echo "Installing libtpu into .tpu, once: 10 seconds and 700 MB"
	@rm -rf .tpu && mkdir .tpu
	@$(PIP) --target .tpu --no-deps $(LIBTPU)
	@touch $@

test-interop: $(INSTALLED) .torch/.installed .beam/.installed ## what needs PyTorch and transformers (.torch, 1.1 GB) or Beam (.beam, 460 MB)
	PYTHONPATH=$(CURDIR)/.torch $(BIN)/python -m pytest -q tests/interop
	PYTHONPATH=$(CURDIR)/.beam $(BIN)/python -m pytest -q tests/interop/test_beam.py

.torch/.installed:
	@echo "Installing torch and transformers into .torch, once: about a minute and 1.1 GB"
	@rm -rf .torch && mkdir .torch
	@$(BIN)/python -m pip freeze --exclude-editable > .torch/constraints.txt
	@$(PIP) --target .torch --constraint .torch/constraints.txt $(TORCH)
	@$(PIP) --target .torch --no-deps $(VOCABULARY)
	@$(BIN)/python -m pip --disable-pip-version-check --no-input download --quiet --no-deps --dest .torch $(GEOCLIP)
	@touch $@

.beam/.installed:
	@echo "Installing Apache Beam into .beam, once: half a minute and 460 MB"
	@rm -rf .beam && mkdir .beam
	@$(BIN)/python -m pip freeze --exclude-editable | grep -vE '^(pillow|pyarrow|python-dateutil)=' > .beam/constraints.txt
	@$(PIP) --target .beam --constraint .beam/constraints.txt $(BEAM)
	@touch $@

# Chromium itself comes from the system.
test-tools: $(INSTALLED) .tools/.installed ## what needs Chromium, fuzzers, Jupyter or MkDocs (.tools, 600 MB)
	PYTHONPATH=$(CURDIR):$(CURDIR)/.tools $(BIN)/python -m pytest -q tests/tools

test-targets: $(INSTALLED) .onnx/.installed .tensorflow/.installed ## what needs jax2onnx (.onnx, 1.1 GB) or TensorFlow (.tensorflow, 2.1 GB)
	$(BIN)/python -m pytest -q tests/targets

.onnx/.installed .tensorflow/.installed: %/.installed:
	@echo "Installing what converts an export into $*, once: some minutes"
	@$(PYTHON) -m venv --clear $*
	@$*/bin/python -m pip --disable-pip-version-check --no-input install --quiet $(call PACKAGES,$(TARGET_$*))
	@touch $@
TARGET_.onnx := onnx
TARGET_.tensorflow := savedmodel

docs: $(INSTALLED) .tools/.installed ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=.:.tools $(BIN)/python -m mkdocs build --strict --quiet
	@echo "The site: $(CURDIR)/site/index.html"

.tools/.installed:
	@echo "Installing playwright, schemathesis, atheris, mkdocs and nbclient into .tools, once: a minute and 600 MB"
	@rm -rf .tools && mkdir .tools
	@$(BIN)/python -m pip freeze --exclude-editable > .tools/constraints.txt
	@$(PIP) --target .tools --constraint .tools/constraints.txt $(TOOLS)
	@touch $@

lint: $(INSTALLED) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(INSTALLED) ## every benchmark, one JSON line each (serving needs locust, export makes environments: by hand)
	@for file in $$(grep -l '__main__' benchmarks/*.py | grep -vE 'torch_reference|benchmarks/(clients|export|serving)'); do \
	  $(BIN)/python -m benchmarks.$$(basename $$file .py) || exit 1; \
	done

lock: $(INSTALLED) ## write requirements-lock.txt again, keeping pins that still fit (UPGRADE=--upgrade renews them)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
	  --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
	  --extra dev --extra prep --extra serve $(UPGRADE) --output-file requirements-lock.txt pyproject.toml

clean: ## remove .venv, .torch, .beam, .tools, .onnx, .tensorflow, .tpu and caches; runs/ stays
	rm -rf .venv .torch .beam .tools .onnx .tensorflow .tpu site .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements-lock.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
	  { echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13: name one, as in make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing requirements-lock.txt into .venv, once: about a minute and 1.7 GB"
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) --require-hashes -r requirements-lock.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@
