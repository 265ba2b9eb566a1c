# make demo    a fresh synthetic slide through the bundled model: prediction and heat maps
# make test    the whole suite; the Triton kernels in the interpreter, in a process of their own
# make test-ray  the tests of --engine ray, which `make test` skips: Ray is large, and starting it takes long
# make check   format, lint, types
# make sanitize  the C++ kernels under the address, undefined-behaviour and thread sanitizers
# make gpu-dry   every public call compiled and launched for five GPUs, none of which is there; takes an hour of processor time, goes on where it was stopped
# make bench   pytest-benchmark suites; bench/README.md names the command of every other figure
# Everything is installed into .venv from constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
CORES := $(shell getconf _NPROCESSORS_ONLN)
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)

.PHONY: demo test test-ray check bench sanitize gpu-dry clean

demo: .venv/slide.installed
	$(BIN)/maskattn demo --out demo_out

# A process a core with one thread each; a file's tests stay together, since they share what is slow to make.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(CORES) --dist loadfile

test: .venv/dev.installed
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels

test-ray: .venv/dev.installed
	$(INSTALL) --editable '.[ray]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cli/test_ray.py

check: .venv/dev.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/dev.installed
	$(BIN)/python -m pytest bench/gpu --benchmark-columns=min,median,iqr,rounds --benchmark-group-by=group

DRY_TARGETS := sm90 sm80 sm86 sm100 sm120

gpu-dry: .venv/dev.installed
	mkdir -p gpu_out
	for target in $(DRY_TARGETS); do for shard in $(shell seq 0 $$(($(CORES) - 1))); do \
	  echo "--target $$target --shard $$shard/$(CORES) --log gpu_out/dry_run.jsonl"; \
	done; done | OMP_NUM_THREADS=1 xargs -P $(CORES) -L 1 $(BIN)/python -m bench.aot.dry_run

sanitize:
	$(MAKE) -j $(CORES) -f csrc/tests/Makefile

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/slide.installed: $(SOURCES) | .venv/bin/pip
	$(INSTALL) torch
	$(INSTALL) --editable '.[slide]'
	touch $@

# timm asks for torchvision, whose own dependencies would replace the pinned torch.
.venv/dev.installed: .venv/slide.installed
	$(INSTALL) --editable '.[slide,zarr,view,hf,train,test,bench,dev]'
	$(INSTALL) --no-deps torchvision timm
	$(INSTALL) huggingface_hub
	touch $@

clean:
	rm -rf .venv build demo_out *.egg-info maskattn/_native*.so
