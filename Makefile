# `make demo` runs trace, tune, verify and run. `make test` is the gate, `make test-fast` its quick part.
# Each target first sets up .venv, which takes one to a few minutes on a new checkout.
PYTHON ?= python3
VENV := .venv
OUT := out
ON_PATH := PATH="$(abspath $(VENV))/bin:$$PATH"

.PHONY: demo test test-fast format docs clean

demo: $(VENV)/ready
	$(ON_PATH) tools/demo.sh $(OUT)

test: $(VENV)/ready
	$(ON_PATH) tools/check.sh

test-fast: $(VENV)/ready
	$(ON_PATH) tools/check.sh -m "not slow and not process"

format: $(VENV)/ready
	$(ON_PATH) ruff format .
	$(ON_PATH) ruff check --fix .

docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(ON_PATH) mkdocs build --strict

# Dependency groups need pip 25.1, which Python 3.11 and 3.12 do not bring.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[all]" --group dev
	touch $@

clean:
	rm -rf $(VENV) $(OUT)
