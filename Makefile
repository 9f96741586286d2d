# `make demo` and `make test` first install all they need in .venv, from the locks with hashes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
WORDS := runs/words
PEERS := $(VENV)/peers
TPU := $(VENV)/tpu
GPU := $(VENV)/gpu
XPK := $(VENV)/xpk
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --no-build-isolation

# Python keeps its bytecode even if the environment says otherwise, because later processes then start in half the time.
export PYTHONDONTWRITEBYTECODE :=
# Each call of a program gets its memory anew; in pages of 2 MiB that takes a tenth less time (docs/performance.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help setup gcs text dev peers tpu gpu demo demo-10x words study study-page test test-slow test-data test-bucket torture-bucket parity parity-quick convert-zoo preflight preflight-quick preflight-gpu slurm apart xpk torture lint lock clean

help:
	@echo "make demo       train a ladder of DiTs on the digits, fit its scaling law, write $(DEMO)/report.html (about 6 minutes)"
	@echo "make demo-10x   two models ten times beyond that ladder, against what it foretold (about 10 minutes)"
	@echo "make words      train a model of words on coloured digits and score what it draws, write $(WORDS)/report.html"
	@echo "make study      which size wins under a sampling budget: trains what docs/study/records.jsonl lacks (about 6 hours on 2 cores, in parts)"
	@echo "make study-page  docs/study.md and its figures from these records alone"
	@echo "make test       the tests of parts (about 7 minutes on 2 cores)"
	@echo "make test-jobs  the tests of whole jobs: trained, killed, resumed, swept, on several hosts (about 6 minutes)"
	@echo "make test-slow  the slow tests, such as coverage of intervals and frozen peers"
	@echo "make test-data  the same 200 pictures through every door of the data: kills, hosts, positions (about 5 minutes)"
	@echo "make test-bucket  a run's whole life in a bucket, on a strict server of object storage (torture-bucket: 200 kills)"
	@echo "make parity     models, samplers and metrics against PyTorch, diffusers, transformers and torch-fidelity; reading PyTorch's files"
	@echo "make parity-quick  the same with fewer sizes of models"
	@echo "make convert-zoo  every form of weights that convert takes, written by PyTorch and diffusers and read back"
	@echo "make preflight  compile real steps with libtpu for all shipped TPU slices, none needed (about 15 minutes)"
	@echo "make preflight-quick  only DiT-XL/2 on v3-256, a batch that is too large, a sampler, and the price of an evaluation"
	@echo "make preflight-gpu  the same for GPUs, none needed: first installs XLA's GPU compiler in $(GPU) (make gpu: 1.1 GB)"
	@echo "make slurm      trainings, sweeps and evaluations on a real SLURM, which this installs (Debian, as root)"
	@echo "make apart      jobs on hosts of a slow network that loses packets, some cut off, frozen or stopped (Linux, as root; about 10 minutes)"
	@echo "make xpk        the commands of launch/gke.sh against xpk's own parser"
	@echo "make torture    kill a training 200 times; 10,000 hostile inputs for every reader (about 15 minutes)"
	@echo "make lint       ruff, for Python 3.11 and 3.13"
	@echo "make setup      install dit_jax and its locked dependencies in $(VENV); make dev: also the tools for tests"
	@echo "make gcs        also the clients of Google Cloud Storage, for gs:// paths"
	@echo "make text       also the tokenizers of text encoders"
	@echo "make lock       resolve the dependencies again and rewrite the locks"

$(BIN)/uv: requirements-bootstrap.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is too old: expected Python 3.11 or later; try make PYTHON=python3.11" >&2; exit 2; }
	@echo "setting up $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-bootstrap.lock
	@touch $@

$(VENV)/.setup: $(BIN)/uv requirements.lock setup.py
	@echo "installing the locked dependencies ..."
	@$(UV) -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.gcs: $(VENV)/.setup requirements-gcs.lock
	@echo "installing the clients of Cloud Storage ..."
	@$(UV) --no-deps -r requirements-gcs.lock
	@touch $@

gcs: $(VENV)/.gcs

$(VENV)/.text: $(VENV)/.setup requirements-text.lock
	@echo "installing the tokenizers ..."
	@$(UV) --no-deps -r requirements-text.lock
	@touch $@

text: $(VENV)/.text

$(VENV)/.dev: $(VENV)/.setup requirements-dev.lock
	@echo "installing the tools for tests ..."
	@$(UV) -r requirements-dev.lock
	@touch $@

setup: $(VENV)/.setup

dev: $(VENV)/.dev

demo: setup
	@$(BIN)/python -m dit_jax.sweep --config=configs/digits_isoflop.py --workdir=$(DEMO)

demo-10x: demo
	@$(BIN)/python benchmarks/targets.py $(DEMO) --multiple=10 --seeds=2

words: setup
	@$(BIN)/python benchmarks/words.py $(WORDS)

study: setup
	@XLA_FLAGS="$${XLA_FLAGS:---xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1}" $(BIN)/python -m benchmarks.study

study-page: setup
	@$(BIN)/python -m benchmarks.study --page

WORKERS := 3
SPREAD = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: dev
	$(BIN)/python -m pytest $(SPREAD) --ignore=tests/parity --ignore=tests/jobs

test-jobs: dev
	$(BIN)/python -m pytest $(SPREAD) tests/jobs

test-slow: dev
	$(BIN)/python -m pytest -m "slow and not bucket and not doors and not tpu and not parity and not gpu_compiler"

test-data: dev
	$(BIN)/python -m pytest -m doors tests/test_doors.py

test-bucket: dev
	$(BIN)/python -m pytest -m "not slow" --durations=5 tests/test_bucket*.py tests/jobs/test_bucket.py

torture-bucket: dev
	$(BIN)/python -m pytest -m "bucket and slow" tests/jobs/test_bucket.py

$(PEERS)/.done: $(VENV)/.dev requirements-peers.lock
	@echo "installing the peers ..."
	@rm -rf $(PEERS)
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps --no-compile --target $(PEERS) -r requirements-peers.lock
	@touch $@

peers: $(PEERS)/.done

parity parity-quick preflight preflight-quick: WORKERS := 2

PARITY = $(BIN)/python -m pytest --disable-warnings $(SPREAD) tests/parity tests/test_weights.py

parity: peers
	PYTHONPATH=$(PEERS) $(PARITY) -m parity

parity-quick: peers
	PYTHONPATH=$(PEERS) $(PARITY) -m "parity and not slow"

convert-zoo: peers
	PYTHONPATH=$(PEERS) $(BIN)/python -m pytest --disable-warnings -m parity tests/parity/test_zoo.py

$(TPU)/.done: $(VENV)/.dev requirements-tpu.lock
	@echo "installing libtpu ..."
	@rm -rf $(TPU)
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps --no-compile --target $(TPU) -r requirements-tpu.lock
	@touch $@

tpu: $(TPU)/.done

preflight: tpu
	PYTHONPATH=$(TPU) $(BIN)/python -m pytest -m tpu -n $(WORKERS) tests/test_preflight_compilers.py tests/test_hardware.py

preflight-quick: tpu
	PYTHONPATH=$(TPU) $(BIN)/python -m pytest -m "tpu and not slow" -n $(WORKERS) tests/test_preflight_compilers.py tests/test_hardware.py

$(GPU)/.done: $(VENV)/.dev requirements-gpu.lock
	@echo "installing XLA's GPU compiler ..."
	@rm -rf $(GPU)
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps --no-compile --target $(GPU) -r requirements-gpu.lock
	@touch $@

gpu: $(GPU)/.done

preflight-gpu: gpu
	PYTHONPATH=$(GPU) $(BIN)/python -m pytest -m gpu_compiler tests/test_preflight_compilers.py

slurm: dev
	$(BIN)/python -m pytest -m slurm tests/test_slurm.py

apart: dev
	$(BIN)/python -m pytest -m apart tests/test_apart.py

$(XPK)/.done: $(VENV)/.dev requirements-xpk.lock
	@echo "installing xpk ..."
	@rm -rf $(XPK)
	@$(PYTHON) -m venv $(XPK)
	@$(XPK)/bin/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-xpk.lock
	@touch $@

xpk: $(XPK)/.done
	XPK=$(XPK) $(BIN)/python -m pytest -m xpk tests/test_xpk.py

torture: dev
	$(BIN)/python -m pytest -m slow tests/jobs/test_kills.py tests/jobs/test_peers.py
	DIT_JAX_FUZZ=10000 $(BIN)/python -m pytest -n 2 tests/test_fuzz.py

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff check --target-version py313 .
	$(BIN)/ruff format --check .

COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --upgrade
WITHOUT = $$(sed -n 's/^\([a-z0-9._-]*\)==.*/--no-emit-package \1/p' $1)

lock: $(BIN)/uv
	$(COMPILE) requirements-bootstrap.in -o requirements-bootstrap.lock
	$(COMPILE) setup.py -o requirements.lock
	$(COMPILE) setup.py --extra dev -c requirements.lock -o requirements-dev.lock
	$(COMPILE) setup.py --extra gcs -c requirements-dev.lock $(call WITHOUT,requirements.lock) -o requirements-gcs.lock
	$(COMPILE) setup.py --extra text -c requirements-dev.lock $(call WITHOUT,requirements.lock) -o requirements-text.lock
	$(COMPILE) setup.py --extra gpu-compiler -c requirements-dev.lock $(call WITHOUT,requirements.lock) -o requirements-gpu.lock
	$(COMPILE) requirements-tpu.in -c requirements.lock $(call WITHOUT,requirements.lock) -o requirements-tpu.lock
	$(COMPILE) requirements-xpk.in -o requirements-xpk.lock
	$(subst --universal,--python-platform x86_64-manylinux_2_28,$(COMPILE)) requirements-peers.in -c requirements-dev.lock \
		$(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) \
		$(call WITHOUT,requirements.lock requirements-dev.lock) -o requirements-peers.lock

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .hypothesis
