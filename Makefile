# `make demo` walks the whole way, `make test` runs the gate, `make test-fast` what of it takes a minute. All set up .venv
# on their first start.
PYTHON ?= python3
VENV := .venv
OUT := out

.PHONY: demo test test-fast clean

demo: $(VENV)/ready
	PATH="$(abspath $(VENV))/bin:$$PATH" tools/demo.sh $(OUT)

test: $(VENV)/ready
	PATH="$(abspath $(VENV))/bin:$$PATH" tools/check.sh

test-fast: $(VENV)/ready
	PATH="$(abspath $(VENV))/bin:$$PATH" tools/check.sh -m "not slow and not process"

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OUT)
