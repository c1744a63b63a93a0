# Two commands set a fresh machine up and do the work: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
COMFYUI_PATH ?= $(HOME)/ComfyUI
COMFYUI_VENV ?= .venv-comfyui
# The Python that runs ComfyUI, beside the one that runs the tests; by default one is made in COMFYUI_VENV.
COMFYUI_PYTHON ?= $(COMFYUI_VENV)/bin/python

PIP = -m pip install --quiet --disable-pip-version-check -c constraints-dev.txt
REQUIREMENTS = pyproject.toml requirements.txt constraints-dev.txt

.PHONY: demo test unit laws check test-comfyui clean

demo: $(VENV)/.headless
	$(VENV)/bin/conceptkit demo

test: check unit laws

# One thread a process: the tests' tensors are tiny, and OpenMP's barriers stall on a busy machine. A file's tests share models: one process.
unit: $(VENV)/.dev .dev/conceptkit
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -c tests/pytest.ini tests --ignore=tests/comfy -n 2 --dist loadfile

# What is bit-equal here may not be where MKL takes another path: these tests run once more on the one it has for every processor.
laws: $(VENV)/.dev .dev/conceptkit
	MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1 $(VENV)/bin/pytest -c tests/pytest.ini -m law \
		tests/unit_core/test_edit.py tests/unit_core/test_methods.py tests/unit_core/test_decomposition.py

check: $(VENV)/.dev .dev/conceptkit
	$(VENV)/bin/ruff check .
	cd .dev && ../$(VENV)/bin/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p conceptkit

test-comfyui: $(VENV)/.dev .dev/conceptkit $(if $(filter $(COMFYUI_VENV)/bin/python,$(COMFYUI_PYTHON)),$(COMFYUI_VENV)/.installed)
	OMP_NUM_THREADS=1 COMFYUI_PATH="$(abspath $(COMFYUI_PATH))" COMFYUI_PYTHON="$(abspath $(COMFYUI_PYTHON))" \
		$(VENV)/bin/pytest -c tests/pytest.ini tests/comfy

$(VENV)/.headless: $(REQUIREMENTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) -e ".[headless]"
	touch $@

$(VENV)/.dev: $(REQUIREMENTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) -e ".[headless,dev]"
	touch $(VENV)/.headless $@

# --no-deps where the dependencies are the templates' media, or torch a second time.
APART = ^(torchvision|torchaudio|comfyui-workflow-templates)
$(COMFYUI_VENV)/.installed: $(REQUIREMENTS)
	$(PYTHON) -m venv $(COMFYUI_VENV)
	grep -vE '$(APART)' "$(COMFYUI_PATH)/requirements.txt" > $(COMFYUI_VENV)/requirements.txt
	grep -E '$(APART)' "$(COMFYUI_PATH)/requirements.txt" > $(COMFYUI_VENV)/apart.txt
	$(COMFYUI_VENV)/bin/python $(PIP) -r $(COMFYUI_VENV)/requirements.txt -r requirements.txt
	$(COMFYUI_VENV)/bin/python $(PIP) --no-deps -r $(COMFYUI_VENV)/apart.txt
	touch $@

# Type checkers cannot see a package that is its own parent.
.dev/conceptkit:
	mkdir -p .dev
	ln -sfn .. $@

clean:
	rm -rf $(VENV) $(COMFYUI_VENV) .dev build dist conceptkit.egg-info .mypy_cache .ruff_cache .pytest_cache tests/.pytest_cache .hypothesis tests/.hypothesis
