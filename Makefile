# make quickstart: sets everything up and runs the whole pipeline on the embedded tasks.
# make test:       sets everything up and passes the tests.
python = $(firstword $(foreach v,$(1),$(shell command -v python$(v))) python3)
PYTHON ?= $(call python,3.11 3.12 3.13)
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
RUN := $(VENV)/bin/python

.PHONY: quickstart test test-slow test-newest lint clean

quickstart: $(VENV)/.installed
	$(RUN) -m moe_jax.experiment --gin_file=experiments/quickstart.gin --gin.MODEL_DIR=runs/quickstart

# A process per core, up to four; a file's tests share what they have compiled.
test: $(VENV)/.installed
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/.installed
	$(RUN) -m pytest -m slow

test-newest:
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=constraints-newest.txt PYTHON=$(call python,3.12 3.13)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck tpu/*.sh

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .venv-newest runs cache build
