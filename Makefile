# All commands of developers and CI. The first target that needs .venv makes it from the lock file. Only make changes it.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet
# The newest torch with a build for CPUs only; other versions install several GB for GPUs.
TORCH := torch==2.13.0 transformers==5.23.0
# Contains CLIP's vocabulary; its code is not run.
VOCABULARY := clip-anytorch==2.6.0
# Contains GeoCLIP's trained encoders; the wheel is downloaded but not installed.
GEOCLIP := geoclip==1.3.0
# Outside the locked environment, because it requires Pillow < 13 and pyarrow < 26.
BEAM := apache-beam==2.77.0
# A browser driver and an accessibility audit, two fuzzers, MkDocs for the documentation, Jupyter for the notebook, and
# what Triton's client imports.
TOOLS := playwright==1.65.2 axe-playwright-python==0.1.8 schemathesis==4.32.5 atheris==3.0.0 \
  mkdocs-material==9.8.2 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11 nbclient==0.11.0 ipykernel==7.4.0 \
  geventhttpclient==2.6.1 python-rapidjson==1.25
# The public client of the Open Inference Protocol. It is installed without its requirements, because it asks for
# ml-dtypes <= 0.5.4, while jax has a newer one.
TRITON := tritonclient==2.73.0
# Compiles for TPUs. The version is the one that the locked jax[tpu] requires.
LIBTPU := libtpu==0.0.42.1
# Stops Pyright's wheel from checking for newer versions over the network.
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

# jax2onnx and TensorFlow have requirements that conflict with .venv, so each has its own environment.
PACKAGES = $$($(BIN)/python -c 'from geotoken_jax.export.targets import TARGETS; print(TARGETS["$(1)"][1])')

.PHONY: help venv demo test test-slow test-interop test-tools test-targets docs lint bench bench-small lock clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

venv: $(INSTALLED) ## install the locked packages and geotoken into .venv, and nothing else

demo: $(INSTALLED) ## run all stages on EarthView, and write a report to open in a browser
	$(BIN)/geotoken all --config=configs/demo.py --workdir=runs/demo
	@echo "The report: $(CURDIR)/runs/demo/report/index.html"

# --max-worker-restart=0: with loadfile, the other workers would wait forever for a worker that died.
# --no-loadscope-reorder: keeps the order of tests/conftest.py, slowest files first. By default xdist starts with the
# files that have most tests.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

test: $(INSTALLED) ## run the tests, without the slow ones
	$(PYTEST) tests --ignore=tests/tools --ignore=tests/targets

# SLURM's tests are skipped where it is not installed (apt-get install slurm-wlm munge).
test-slow: $(INSTALLED) .tpu/.installed ## run the slow tests: several processes, SLURM, compilation for TPUs (.tpu, 700 MB)
	PYTHONPATH=$(CURDIR)/.tpu $(PYTEST) -m slow tests --ignore=tests/tools

.tpu/.installed:
	@echo "Installing libtpu into .tpu (once; 10 seconds, 700 MB)"
	@rm -rf .tpu && mkdir .tpu
	@$(PIP) --target .tpu --no-deps $(LIBTPU)
	@touch $@

test-interop: $(INSTALLED) .torch/.installed .beam/.installed ## test with PyTorch and transformers (.torch, 1.1 GB) and with Beam (.beam, 460 MB)
	PYTHONPATH=$(CURDIR)/.torch $(PYTEST) tests/interop
	PYTHONPATH=$(CURDIR)/.beam $(BIN)/python -m pytest -q tests/interop/test_beam.py

.torch/.installed:
	@echo "Installing torch and transformers into .torch (once; about a minute, 1.1 GB)"
	@rm -rf .torch && mkdir .torch
	@$(BIN)/python -m pip freeze --exclude-editable > .torch/constraints.txt
	@$(PIP) --target .torch --constraint .torch/constraints.txt $(TORCH)
	@$(PIP) --target .torch --no-deps $(VOCABULARY)
	@$(BIN)/python -m pip --disable-pip-version-check --no-input download --quiet --no-deps --dest .torch $(GEOCLIP)
	@touch $@

.beam/.installed:
	@echo "Installing Apache Beam into .beam (once; half a minute, 460 MB)"
	@rm -rf .beam && mkdir .beam
	@$(BIN)/python -m pip freeze --exclude-editable | grep -vE '^(pillow|pyarrow|python-dateutil)=' > .beam/constraints.txt
	@$(PIP) --target .beam --constraint .beam/constraints.txt $(BEAM)
	@touch $@

# Chromium must be installed on the system; playwright only drives it. Nothing runs beside the fuzzers, which must ask
# often in a limited time.
test-tools: $(INSTALLED) .tools/.installed ## test with Chromium, fuzzers, Jupyter, MkDocs and Triton's client (.tools, 650 MB)
	PYTHONPATH=$(CURDIR):$(CURDIR)/.tools $(BIN)/python -m pytest -q tests/tools/test_fuzz.py
	PYTHONPATH=$(CURDIR):$(CURDIR)/.tools $(PYTEST) tests/tools --ignore=tests/tools/test_fuzz.py

test-targets: $(INSTALLED) .onnx/.installed .tensorflow/.installed ## test with jax2onnx (.onnx, 1.1 GB) and TensorFlow (.tensorflow, 2.1 GB)
	$(BIN)/python -m pytest -q tests/targets

.onnx/.installed .tensorflow/.installed: %/.installed:
	@echo "Installing the converter of exports into $* (once; some minutes)"
	@$(PYTHON) -m venv --clear $*
	@$*/bin/python -m pip --disable-pip-version-check --no-input install --quiet $(call PACKAGES,$(TARGET_$*))
	@touch $@
TARGET_.onnx := onnx
TARGET_.tensorflow := savedmodel

docs: $(INSTALLED) .tools/.installed ## build the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=.:.tools $(BIN)/python -m mkdocs build --strict --quiet
	@echo "The site: $(CURDIR)/site/index.html"

.tools/.installed:
	@echo "Installing playwright, schemathesis, atheris, mkdocs, nbclient and tritonclient into .tools (once; a minute, 650 MB)"
	@rm -rf .tools && mkdir .tools
	@$(BIN)/python -m pip freeze --exclude-editable > .tools/constraints.txt
	@$(PIP) --target .tools --constraint .tools/constraints.txt $(TOOLS)
	@$(PIP) --target .tools --no-deps $(TRITON)
	@touch $@

lint: $(INSTALLED) ## run ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(INSTALLED) ## run the benchmarks, one JSON line each (not serving, which needs locust, not export, which makes environments, and not folder, which needs an export)
	@$(BIN)/python -m benchmarks

bench-small: $(INSTALLED) ## run the same benchmarks at the smallest sizes, to test that they run
	@$(BIN)/python -m benchmarks --small

lock: $(INSTALLED) ## update requirements-lock.txt, keeping versions that still fit (UPGRADE=--upgrade for new versions)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
	  --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
	  --extra dev --extra prep --extra serve $(UPGRADE) --output-file requirements-lock.txt pyproject.toml

clean: ## remove all environments, site/, build/, dist/ and caches, but not runs/
	rm -rf .venv .torch .beam .tools .onnx .tensorflow .tpu site .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements-lock.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
	  { echo "PYTHON is $(PYTHON), which is not Python 3.11, 3.12 or 3.13: set it, as in make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing requirements-lock.txt into .venv (once; about a minute, 1.7 GB)"
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) --require-hashes -r requirements-lock.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@
