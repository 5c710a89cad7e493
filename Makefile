# Everything lives in .venv and dist/; nothing needs root, and nothing but setup and cpp-headers uses the network.
.POSIX:

PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin

help:
	@echo 'make export   set up, then export the 2 B model of the SD3 paper (random weights): a bundle with engines in dist/'
	@echo 'make test     set up, then check style, layers and types, and run the whole test suite'
	@echo 'make lint     set up, then check style, layers and types'
	@echo 'make cpp      set up, then build the C++ runtime in dist/cpp, where there is a compiler'
	@echo 'make cpp-tensorrt TENSORRT_INCLUDE_DIR=… CUDA_INCLUDE_DIR=…   then test its TensorRT back end on fakes'
	@echo 'make soak     set up, then run the long tests; the result goes to bench/results/soak.txt'
	@echo 'make setup    make .venv; does nothing when it is up to date, repairs it when it is broken'
	@echo 'make clean    remove .venv and the caches; dist/ stays'
	@echo
	@echo 'PYTHON=python3.12 chooses the Python (3.11 or later) that .venv is made with.'
	@echo 'PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gets PyTorch without CUDA: 0.2 GB, not 3 GB.'

# .venv/.complete says what was installed, and where. With another list of packages they are installed again; a
# .venv that was moved, whose Python is gone, or whose installation was broken off is made anew.
setup:
	@want="$$(cat pyproject.toml constraints.txt | cksum) $$PWD"; \
	if [ "$$(cat $(VENV)/.complete 2>/dev/null)" = "$$want" ] && $(BIN)/python -P -c \
	    'import mmdit_deploy; from importlib.metadata import version; version("torch")' 2>/dev/null; \
	then exit 0; fi; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'This needs Python 3.11 or later; $(PYTHON) is none. Try: make PYTHON=python3.12 …' >&2; exit 1; }; \
	if [ -e $(VENV)/.incomplete ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	    [ -e $(VENV)/.complete ] && [ "$$(sed 's/^[0-9]* [0-9]* //' $(VENV)/.complete)" != "$$PWD" ]; }; \
	then \
	    $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	        echo '$(PYTHON) cannot make a venv. On Debian and Ubuntu: apt install python3-venv;' >&2; \
	        echo 'or name another Python: make PYTHON=…' >&2; exit 1; }; \
	    $(PYTHON) -m venv --clear $(VENV) || exit 1; \
	fi; \
	touch $(VENV)/.incomplete; rm -f $(VENV)/.complete; \
	$(BIN)/python -m pip install "$$(grep '^torch==' constraints.txt)" -c constraints.txt -e '.[cpu,rtx,dev]' \
	    || exit 1; \
	echo "$$want" > $(VENV)/.complete; rm -f $(VENV)/.incomplete

export: setup
	$(BIN)/mmdit-export --depth 24 --fp16 --force

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

# The C++ runtime against the wheel's ONNX Runtime: optimized, and with sanitizers. Its tests are skipped where it cannot
# be built. CPP_BUILDS="threads" builds it for ThreadSanitizer.
CPP = dist/cpp
CPP_BUILDS = release sanitized
CPP_JOBS = 2
CPP_TESTED = -DCMAKE_BUILD_TYPE=None -DMMDIT_TESTS=$$PWD/tests/cpp
DEBIAN = http://deb.debian.org/debian

cpp: setup
	@if ! command -v cmake >/dev/null || ! printf '#include <openssl/evp.h>\n' | c++ -E -x c++ - >/dev/null 2>&1; \
	then echo 'The C++ runtime is left out, and its tests are skipped: apt install cmake g++ libssl-dev' >&2; exit 0; fi; \
	status=0; $(BIN)/python engines/cpp/debian_headers.py $(DEBIAN) $(CPP)/headers || status=$$?; \
	case $$status in \
	0) $(MAKE) cpp-builds;; \
	3) echo 'The C++ runtime is left out, and its tests are skipped: its headers are not there.' >&2;; \
	*) exit $$status;; \
	esac

cpp-headers:
	@$(BIN)/python engines/cpp/debian_headers.py $(DEBIAN) $(CPP)/headers

cpp-builds: cpp-headers
	@for build in $(CPP_BUILDS); do \
	    case $$build in \
	    release) flags='-DCMAKE_BUILD_TYPE=Release';; \
	    sanitized) flags="$(CPP_TESTED) -DMMDIT_SANITIZE=address,undefined";; \
	    threads) flags="$(CPP_TESTED) -DMMDIT_SANITIZE=thread";; \
	    esac; \
	    cmake -S engines/cpp -B $(CPP)/$$build $$flags -DMMDIT_TENSORRT=OFF \
	        -Dnlohmann_json_DIR=$$PWD/$(CPP)/headers/share/cmake/nlohmann_json \
	        -DONNXRUNTIME_INCLUDE_DIR=$$PWD/$(CPP)/headers/include/onnxruntime \
	        -DONNXRUNTIME_LIBRARY="$$(echo $$PWD/$(VENV)/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime.so.*)" \
	        && cmake --build $(CPP)/$$build -j $(CPP_JOBS) || exit 1; \
	done

# The TensorRT back end, built from NVIDIA's headers, on a TensorRT and a GPU that are not there. The folders are named on
# the command line or in the environment.
cpp-tensorrt:
	@if [ ! -e "$(TENSORRT_INCLUDE_DIR)/NvInferRuntime.h" ] || [ ! -e "$(CUDA_INCLUDE_DIR)/cuda_runtime_api.h" ]; then \
	    echo 'TENSORRT_INCLUDE_DIR=… names the folder of NvInferRuntime.h (include of github.com/NVIDIA/TensorRT), and' >&2; \
	    echo 'CUDA_INCLUDE_DIR=… that of cuda_runtime_api.h (include of the CUDA toolkit).' >&2; exit 2; fi
	@$(MAKE) cpp
	TENSORRT_INCLUDE_DIR="$(TENSORRT_INCLUDE_DIR)" CUDA_INCLUDE_DIR="$(CUDA_INCLUDE_DIR)" \
	    $(BIN)/python -m pytest -m 'soak or not soak' tests/cpp/test_tensorrt.py

# A file of tests is one process's work: its tests share what they export. One thread each, for there are more files than
# cores.
test: lint cpp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --durations 60

soak: cpp
	@status=0; $(BIN)/python -m pytest -q -m soak --durations=0 > bench/results/soak.txt || status=$$?; \
	cat bench/results/soak.txt; exit $$status

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis

.PHONY: help setup export lint cpp cpp-headers cpp-builds cpp-tensorrt test soak clean
