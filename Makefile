# int8qa: three words to learn are `make up`, `make test` and `make check`.
VENV ?= .venv
BIN := $(VENV)/bin
export PYTHONUNBUFFERED := 1
# Two processes share the tests, file by file as listed (by default those of few tests come
# last, however long); those of whole services have the machine to themselves.
PYTEST := $(BIN)/python -m pytest
SHARED := -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/integration

.DEFAULT_GOAL := help
.PHONY: help install up test test-all check gpu-check bench golden lock settings boards compose-test soak audit sbom clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 18

install: ## create .venv and install everything, pinned
	@scripts/install $(VENV)

up: install ## build the demo models if need be, start Triton and the gateway on 127.0.0.1:8080
	@exec $(BIN)/int8qa up

test: install ## the tests, but for the slow ones
	@OMP_NUM_THREADS=1 $(PYTEST) -m "not slow" $(SHARED)
	@$(PYTEST) -m "not slow" tests/integration

test-all: install ## all tests; plans are built if tensorrt-rtx is installed
	@OMP_NUM_THREADS=1 $(PYTEST) $(SHARED)
	@$(PYTEST) tests/integration

check: install ## formatting, lint, types, import rules, generated docs
	@$(BIN)/ruff format --check service tests scripts deploy bench
	@$(BIN)/ruff check service tests scripts deploy bench
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python scripts/generate_settings_table.py --check
	@$(BIN)/python scripts/generate_boards.py --check
	@$(BIN)/python deploy/kubernetes/generate_rules.py --check
	@$(BIN)/python -m pytest -q tests/deploy/test_rendering.py
	@$(BIN)/python scripts/list_licenses.py --check
	@$(BIN)/python bench/generate_table.py --check

audit: install ## the lock held to the database of known vulnerabilities
	@$(BIN)/python scripts/supply_chain.py audit

soak: install ## 20 minutes of mixed traffic on a running gateway (PID=… of it), with a plot
	@$(BIN)/int8qa bench soak --pid $(PID)

sbom: install ## CycloneDX bills of materials of the images, into dist/
	@$(BIN)/python scripts/supply_chain.py sbom

compose-test: ## build and run the whole stack of docker-compose.yml (needs a Docker engine)
	@scripts/compose-test

gpu-check: install ## build, serve and measure on this NVIDIA GPU; one report file
	@$(BIN)/int8qa gpu-check

bench: install ## the README's table: the engine alone, int8qa and its peers in turns (DATA=… LIMIT=…)
	@test -e model_repository/contract.json || $(BIN)/int8qa build
	@$(BIN)/int8qa bench peers $(if $(DATA),--data $(DATA)) $(if $(LIMIT),--limit $(LIMIT))
	@$(BIN)/python bench/generate_table.py

golden: install ## remake the reader's golden answers, with transformers 5.2 in an environment of its own
	@test -x .venv-golden/bin/python || $(BIN)/python -m venv .venv-golden
	@.venv-golden/bin/python -m pip install --quiet "torch==2.13.0" "transformers==5.2.0" "numpy<2"
	@.venv-golden/bin/python -m tests.golden.make_pipeline_golden \
	  --checkpoint service/int8qa/data/checkpoint \
	  --questions service/int8qa/data/questions --output tests/golden/pipeline

lock: ## resolve requirements.lock anew (needs uv)
	@UV_PYTHON_DOWNLOADS=never uv pip compile pyproject.toml --extra build --extra cpu --extra dev \
	  --universal --python-version 3.10 --generate-hashes --no-header --no-annotate \
	  $(foreach p,$(NOT_LOCKED),--no-emit-package $(p)) --output-file requirements.lock --quiet --upgrade

boards: install ## write Grafana's boards from scripts/boards (Python 3.11 or newer)
	@$(BIN)/python scripts/generate_boards.py

settings: install ## write the README's settings table and .env from the code
	@$(BIN)/python scripts/generate_settings_table.py

clean: ## remove the environment and built models
	@rm -rf $(VENV) model_repository/contract.json model_repository/manifest.json \
	  model_repository/tokenizer.json model_repository/qa_*/1 .mypy_cache .ruff_cache .pytest_cache

# torch is pinned in pyproject.toml: its wheels, and with them their hashes and the
# CUDA packages they need, differ by build. openvino-telemetry reports to Google
# Analytics, and OpenVINO works without it.
NOT_LOCKED := openvino-telemetry torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas \
  nvidia-cuda-cupti nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft \
  nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13 \
  nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx
