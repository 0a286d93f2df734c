# make help lists the targets. PORT, MODEL, ARGS, PYTHON and VENV are variables:
#   make serve PORT=9000 ARGS="--max-num-seqs 8"        make test ARGS="-k lock"

.DEFAULT_GOAL := help
.PHONY: help install serve bench test lint clean

VENV ?= .venv
PORT ?= 8000
DEMO := vllm_kvcompress/demo_model
MODEL ?= $(DEMO)
ARGS ?=
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null \
	&& echo $$p && break; done)

INSTALLED := $(VENV)/.installed
PURE_ROOMS := $(wildcard $(addprefix vllm_kvcompress/,policy accounting.py config.py knobs.py presets.py))

help:
	@echo "make install   $(VENV)/ with vLLM 0.32 and this project, for the CPU or GPU found here"
	@echo "make serve     install, then serve MODEL (the shipped demo model) with --kv-compress on PORT (8000)"
	@echo "make bench     install, then measure the demo model and show all of it in $(RESULTS)/index.html"
	@echo "make test      install, then run the tests; ARGS go to pytest"
	@echo "make lint      install, then ruff's rules and format, and mypy on the pure rooms"
	@echo "make clean     remove caches and build results; $(VENV)/ stays"

install: $(INSTALLED)
	@:

# An __init__.py stands here because a new top-level package is a new line in the package map.
$(INSTALLED): pyproject.toml setup.py requirements/cpu.lock requirements/dev.lock \
		tools/install.py tools/quiet_pip.py tools/vllm_metadata.py \
		$(wildcard benchmarks/__init__.py configs/__init__.py kernels/__init__.py) \
		$(wildcard csrc/*.cpp csrc/codec/* csrc/cpu/*)
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.14 is needed: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) tools/install.py --venv $(VENV)
	@touch $@

ifeq ($(MODEL),$(DEMO))
NAME := demo
SERVED_AS := --served-model-name $(NAME) --dtype float32
serve: export VLLM_CPU_KVCACHE_SPACE ?= 1
else
NAME := $(MODEL)
SERVED_AS := --served-model-name $(NAME)
endif
EXAMPLE = $(VENV)/bin/python -m vllm_kvcompress.bench.demo_model.request --port $(PORT) --model $(NAME)

serve: install
	@$(EXAMPLE)
	@$(EXAMPLE) --when-ready & \
	exec $(VENV)/bin/vllm serve $(MODEL) --kv-compress $(SERVED_AS) --port $(PORT) $(ARGS)

# Under 10 minutes on two idle cores, and 2 more the first time: kvpress gets its own .venv-kvpress.
# An interrupted quality run goes on where it stopped. A missed verdict is on the page, not a failure.
RESULTS ?= results
BENCH := $(VENV)/bin/vllm-kvcompress bench
QUALITY ?= --n 50 --policies kv-compress snapkv random --budgets 0.5 0.25 0.125 0.0625 0.03125
PEERS ?= --peer kvpress:SnapKVPress \
	--peer "kvpress:CriticalAdaKVPress(press=SnapKVPress(kernel_size=21,window_size=8))"
THROUGHPUT ?= --rates 8 --presets kv-compress kv-compress-continual \
	--prompts 4 16 --prompt-tokens 256 1024 --output-tokens 256 --rounds 3

bench: install
	$(BENCH) quality $(QUALITY) $(PEERS) --json $(RESULTS)/quality.json
	@rm -f $(RESULTS)/throughput.json
	$(BENCH) throughput $(THROUGHPUT) --json $(RESULTS)/throughput.json || test -f $(RESULTS)/throughput.json
	$(BENCH) report $(RESULTS)

# Two files at a time: each keeps the engine that its tests share, and about 3 GB.
JOBS ?= 2
test: install
	$(VENV)/bin/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/mypy $(PURE_ROOMS)

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
