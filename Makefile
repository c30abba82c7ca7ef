# Two commands: `make demo` walks the whole way, `make test` runs the gate. Both set up .venv on their first start.
PYTHON ?= python3
VENV := .venv
OUT := out

.PHONY: demo test clean

demo: $(VENV)/ready
	PATH="$(abspath $(VENV))/bin:$$PATH" tools/demo.sh $(OUT)

test: $(VENV)/ready
	PATH="$(abspath $(VENV))/bin:$$PATH" tools/check.sh

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OUT)
