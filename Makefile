# make demo | make test are all a newcomer needs; the rest is for people who change the code.
SHELL := /bin/sh
VENV := .venv
PY := $(VENV)/bin/python
INSTALL := sh .ci/install
NEXT := $(VENV)/jax-next
# The TPU compiler lies beside the packages: among them, jax would look for TPUs first.
LIBTPU := $(VENV)/libtpu
# What the newer jax is held to: configs, operations, models, one step, a checkpoint,
# decoding, and of the kernels in interpreters of the device's language, which take long,
# one for TPUs and what lowers for GPUs.
REDUCED := tests/test_config.py tests/test_validation.py tests/hardware \
  tests/ops/test_*.py tests/ops/tpu/test_tpu_dense_attention.py \
  tests/ops/gpu/test_mosaic_gpu_segment_attention.py::test_kernels_lower_for_a_gpu \
  tests/model/test_transformer.py tests/model/test_cache.py tests/test_generate.py \
  tests/train/test_step.py tests/train/test_checkpoint.py
# Not what repeats another test's program or compares ours with ours.
OFTEN := 8-8-gelu remat_changes packed_document_is_the_document_alone[dense \
  packed_document_is_the_document_alone[m bfloat16_is_close sample_alone scanned_layers \
  encoder_ignores padding_changes padding_after new_values dropout initial_weights \
  rotary_logits union-patch decode_applies does_not_recompile row_that_ended \
  same_key one_new_token memory_grows accumulation nonfinite loss_chunks diagnosis \
  classifiers_learn learning_rate_metric \
  router_losses full_forward[union full_forward[dense models_own_logits
REDUCED += -k "not (tpu_dense and grouped or $(shell echo '$(OFTEN)' | sed 's/ / or /g'))"
PYTEST := JAX_PLATFORMS=cpu $(PY) -m pytest -q -n 2 --dist worksteal

.PHONY: help venv demo test lint aot notebooks clean
help:
	@echo "make venv   the project's own .venv"
	@echo "make demo   train a dense, an MoE and a union model on this machine; table and report"
	@echo "make test   every test on jax 0.11, the reduced set on jax 0.12, coverage"
	@echo "make lint   ruff and pyrefly"
	@echo "make aot    compile kernels and training steps for TPUs that aren't here; hours"

$(VENV)/.base: pyproject.toml constraints.txt
	@python=$$(sh .ci/find-python) && \
	  echo "Making $(VENV) with $$python (once, about a minute) ..." && \
	  { [ -x $(PY) ] || "$$python" -m venv $(VENV); }
	@$(INSTALL) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "Installing the test tools into $(VENV) ..."
	@$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(NEXT)/.done: constraints-next.txt $(VENV)/.dev
	@echo "Installing the newer jax beside it ..."
	@rm -rf $(NEXT)
	@$(INSTALL) --no-deps --target $(NEXT) --requirement constraints-next.txt
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

test: $(VENV)/.dev $(NEXT)/.done $(LIBTPU)/.done
	@echo "== every test, jax 0.11, 8 simulated devices"
	@PYTHONPATH=$(LIBTPU) $(PYTEST) --cov --cov-report= tests
	@$(PY) -m coverage report --fail-under=85 --skip-covered --show-missing | tail -n 40
	@echo "== the reduced set, jax 0.12"
	@PYTHONPATH=$(NEXT) $(PYTEST) $(REDUCED)

lint: $(VENV)/.dev
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	@$(VENV)/bin/pyrefly check

aot: $(LIBTPU)/.done
	@PYTHONPATH=$(LIBTPU) $(PY) benchmarks/aot_tpu.py --out benchmarks/results/aot_tpu.json

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
