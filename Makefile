# Every target sets up .venv by itself, once: `make demo` on a fresh machine needs Python 3.10+ and a C++ compiler.
#   make demo [MINUTES=5]   train a small CLIP with the fused loss and write limber_fast_demo/report.html
#   make test               the test suite
#   make bench              ratios against eager PyTorch, as JSON and one page
#   make bench-peers        install the int8 engines that the benchmarks compare with
#   make gpu                checks of the GPU code and its modelled bounds; with a CUDA device also tests and benchmarks
#   make gpu-matrix         the same checks under Triton 3.6, 3.8 and 3.9 [BUILDS=all: every build on every chip]
#   make test-gpu-full      every build gated, more cases as PTX, how many single-line faults in it are noticed (an hour)
#   make lint | clean

PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 5
BUILDS ?= first
BENCH ?=

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --no-compile
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml setup.py MANIFEST.in $(shell find csrc -type f)

# An interpreter that already has torch lends it to the venv: no second download, and GPU machines keep their own build.
SITE = $(shell $(PYTHON) -c 'import importlib.util as u; print("--system-site-packages" * bool(u.find_spec("torch")))')

# A venv is ours only while its stamp, written last, names this folder and this interpreter: one half made, moved here
# or made with another PYTHON is made anew. One whose sources changed is installed into again.
ORIGIN := $(CURDIR) $(PYTHON)
ifneq ($(ORIGIN),$(shell cat $(STAMP) 2>/dev/null))
$(shell rm -f $(STAMP))
endif

# Python compiles a module when it is first imported, for every later process (of the thousands in torch and transformers
# most never are): a caller's wish to keep no bytecode would have each process compile them again, 5 of its 9 seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint bench bench-peers gpu gpu-matrix test-gpu-full clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(RUN) -m limber_fast demo --minutes $(MINUTES)

# A file's tests stay in one process, with what they share. Its waiting threads leave the cores to the other processes.
test: $(STAMP)
	OMP_WAIT_POLICY=passive $(RUN) -m pytest -n logical --maxprocesses 4 --dist loadfile

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'csrc/*.cu')

bench: $(STAMP)
	$(RUN) -m limber_fast bench

bench-peers: $(STAMP)
	$(RUN) -m pip install --quiet ctranslate2 bitsandbytes torchao

# With a device its own tests and rows run, and what needs none is left to machines without. It may take 8 minutes: the
# tests fail where they take more than 4, no row of the benchmarks starts after 6 (but they get one minute in any case),
# and the page names those left out. The benchmarks take the launches that were fastest on this device. BENCH holds
# more options: BENCH='--compare old/bench.json --fail-over 10%'
gpu: $(STAMP)
	@start=$$(date +%s); $(RUN) -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; missing=$$?; set -ex; \
	if [ $$missing = 0 ]; then OMP_WAIT_POLICY=passive timeout --foreground --signal=INT --kill-after=20 240 \
	    $(RUN) -m pytest -m cuda -n logical --maxprocesses 4 --dist loadfile || { code=$$?; \
	    [ $$code != 124 ] || echo "make gpu: the tests took more than 4 minutes"; exit $$code; }; \
	else LIMBER_FAST_GPU_BUILDS=first $(RUN) -m pytest tests/gpu; fi; \
	$(RUN) -m limber_fast bench --modelled -k plain-bf16; \
	if [ $$missing = 0 ]; then minutes=$$((6 - ($$(date +%s) - start) / 60)); \
	  LIMBER_FAST_AUTOTUNE=1 $(RUN) -m limber_fast bench -k cuda --trace --minutes $$((minutes > 1 ? minutes : 1)) \
	    $(BENCH); fi
	@$(RUN) -c 'import torch; torch.cuda.is_available() or print("make gpu: no CUDA device: the kernels were compiled", \
	"and checked, nothing was run on a GPU")'

test-gpu-full: $(STAMP)
	$(RUN) -m pytest -m slow_gpu -s tests/gpu

gpu-matrix: $(STAMP)
	.ci/gpu-matrix $(RUN) $(BUILDS)

clean:
	rm -rf $(VENV) build dist *.egg-info limber_fast/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks

# The native modules compile while the packages arrive; a command in the background would not hear Ctrl-C.
$(STAMP): $(SOURCES)
	test -e $@ || $(PYTHON) -m venv --clear $(SITE) $(VENV)
	$(RUN) tools/requirements.py demo bench test dev > $(VENV)/requirements.txt
	$(PIP) -r $(VENV)/requirements.txt & packages=$$!; trap 'kill $$packages; exit 130' INT TERM; \
	$(PIP) --no-deps -e .; built=$$?; wait $$packages && exit $$built
	echo '$(ORIGIN)' > $@
