# Every target runs the setup first; the setup does nothing if the environment is current.
SHELL := bash
VENV := .venv
PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PATH

.PHONY: help setup demo lint docs reference format test test-busy test-studies studies test-gpu \
	test-cluster cluster-up cluster-down matrix bench bench-gpu baselines wheel image lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Create .venv from the lock files
	@tools/setup.sh

demo: setup ## Run the full pipeline on this machine; KEEP=1 keeps the services running
	@convoy demo

lint: setup docs ## Check style, format, spelling, types and documentation
	ruff check .
	ruff format --check .
	codespell
	mypy
	MYPYPATH=tools/cluster mypy tools/cluster

docs: setup ## Build the documentation into build/site; warnings are errors
	python tools/reference.py --check
	@set -o pipefail; NO_MKDOCS_2_WARNING=1 mkdocs build --strict 2>&1 | { grep -v ^INFO || true; }

reference: setup ## Write docs/reference/ from the code
	python tools/reference.py

format: setup ## Rewrite the code in the project's style
	ruff check --fix .
	ruff format .

test: setup ## Run every test that needs no cluster
	OMP_NUM_THREADS=1 pytest -n $$(($$(nproc) + 1)) --dist loadgroup --durations 15 \
		--ignore tests/cluster --ignore tests/studies

test-busy: setup ## Run `make test` in random order (SEED), with three busy loops in parallel
	@loops=(); for _ in 1 2 3; do (while :; do :; done) & loops+=($$!); done; \
	trap 'kill "$${loops[@]}"' EXIT; \
	CONVOY_SHUFFLE=$${SEED:-1} $(MAKE) --no-print-directory test

test-studies: setup ## Run every study with --quick, stopped once and resumed
	pytest --durations 5 tests/studies

studies: setup ## Run every study at full size (hours) and write docs/studies.md
	convoy study all
	python tools/studies.py runs/study docs

test-cluster: setup ## Run every test on a real Kubernetes (KUBECONFIG, or a new local cluster)
	pytest --durations 15 -o timeout_func_only=true tests/cluster

test-gpu: setup ## Test the engine on this machine's GPUs against the reference loop
	CONVOY_GPU=1 pytest -v --durations 5 tests/equivalence/test_gpu.py

cluster-up: setup ## Create a Kubernetes on this machine (root, Debian, Go); see docs/cluster.md
	@python tools/cluster/cluster.py up

cluster-down: setup ## Delete that Kubernetes
	@python tools/cluster/cluster.py down

matrix: setup ## Test every parallel configuration against the reference loop; writes docs/matrix.md
	CONVOY_MATRIX=$(CURDIR)/runs/matrix pytest --timeout 3600 \
		tests/equivalence/test_reference_grid.py tests/equivalence/test_resume_grid.py
	python tools/matrix.py runs/matrix docs/matrix.md

bench: export CUDA_VISIBLE_DEVICES :=
bench: setup ## Run the benchmarks; prints tables
	python benchmarks/pack.py
	python benchmarks/data.py
	python benchmarks/storage.py
	python benchmarks/models.py
	python benchmarks/step.py
	python benchmarks/pipeline.py
	python benchmarks/checkpoint.py

bench-gpu: setup ## Measure training steps and the full pipeline on one GPU; prints tables
	python benchmarks/gpu.py

baselines: setup ## Install the baselines of benchmarks/data.py into .venv-baselines
	tools/setup.sh --baselines

wheel: setup ## Build dist/convoy-*.whl, with the native decoder of this processor; CPython >= 3.11
	"$$(tools/setup.sh --print-uv)" build --quiet --wheel --no-build-isolation \
		--python $(VENV)/bin/python --out-dir dist .

image: ## Build the container image with docker or buildah (BASE, IMAGE)
	tools/image.sh

lock: setup ## Update the lock files
	tools/lock.sh

clean: ## Remove the environment and all outputs of runs and builds
	rm -rf $(VENV) .venv-baselines runs build dist trainer/data/*.so *.egg-info \
		.mypy_cache .ruff_cache .pytest_cache
