# make demo | make test are all a newcomer needs; the rest is for people who change the code.
SHELL := /bin/sh
VENV := .venv
PY := $(VENV)/bin/python
INSTALL := sh .ci/install
BEFORE := $(VENV)/jax-before
# The TPU compiler lies beside the packages: among them, jax would look for TPUs first.
LIBTPU := $(VENV)/libtpu

.PHONY: help venv demo test nightly lint docs aot clean
help:
	@echo "make venv   the project's own .venv"
	@echo "make demo   train a dense, an MoE and a union model on this machine; table and report"
	@echo "make test   the tests on jax 0.12, the marked ones on jax 0.11, coverage"
	@echo "make nightly  the tests that take long and repeat what shorter ones hold"
	@echo "make lint   ruff and pyrefly"
	@echo "make docs   the site, into site/; NOTEBOOKS=run executes the notebooks for it (minutes)"
	@echo "make clean  all that make made; trained runs stay"
	@echo "make aot    compile kernels and training steps for TPUs that aren't here; hours"

$(VENV)/.base: pyproject.toml constraints.txt
	@python=$$(sh .ci/find-python) && \
	  echo "Making $(VENV) with $$python (once, about a minute) ..." && \
	  { [ -x $(PY) ] || "$$python" -m venv $(VENV); }
	@$(INSTALL) --constraint constraints.txt --editable '.[all]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "Installing the test tools into $(VENV) ..."
	@$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(BEFORE)/.done: constraints-before.txt $(VENV)/.dev
	@echo "Installing jax 0.11 beside it ..."
	@rm -rf $(BEFORE)
	@$(INSTALL) --no-deps --target $(BEFORE) --requirement constraints-before.txt
	@touch $@

$(LIBTPU)/.done: constraints-tpu.txt $(VENV)/.dev
	@echo "Installing the TPU compiler beside it ..."
	@rm -rf $(LIBTPU)
	@$(INSTALL) --no-deps --target $(LIBTPU) --requirement constraints-tpu.txt
	@touch $@

venv: $(VENV)/.base
	@echo "$(VENV) is ready: $(VENV)/bin/uoe --help"

demo: $(VENV)/.base
	@$(VENV)/bin/uoe demo

test: $(VENV)/.dev $(BEFORE)/.done $(LIBTPU)/.done
	@sh .ci/test

nightly: $(VENV)/.dev $(BEFORE)/.done $(LIBTPU)/.done
	@sh .ci/test nightly

lint: $(VENV)/.dev
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	@$(VENV)/bin/pyrefly check

$(VENV)/.docs: $(VENV)/.dev
	@echo "Installing what makes the site into $(VENV) ..."
	@$(INSTALL) --constraint constraints.txt --editable '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	@JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 UOE_NOTEBOOKS=$(NOTEBOOKS) \
	  $(PY) -m mkdocs build --strict --quiet
	@echo "site/index.html"

aot: $(LIBTPU)/.done
	@PYTHONPATH=$(LIBTPU) $(PY) benchmarks/aot_tpu.py --out benchmarks/results/aot_tpu.json

clean:
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .hypothesis
