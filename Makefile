# The commands of a checkout. Everything runs in an environment of its own, $(VENV), which is made once and reused while
# pyproject.toml and setup.py do not change.
#
#   make quickstart   render the shapes world, train, evaluate, draw, print the table
#   make test         the test suite, in two processes
#   make build        compile the faster engines of deformable attention for this machine (optional; needs a C++ compiler)
#   make demo         segment images of the shapes world with the shipped weights
#   make app          the same for any image and any class names on a web page of this machine
#   make lint         ruff
#
# PYTHON=python3.12 chooses the interpreter; QUICKSTART_ARGS, PYTEST_ARGS and APP_ARGS are handed on.

PYTHON ?= python3
VENV ?= .venv
QUICKSTART_ARGS ?=
PYTEST_ARGS ?=
APP_ARGS ?=

RUN := $(VENV)/bin/python
STAMP := $(VENV)/.complete

.PHONY: quickstart test build demo app lint

quickstart: $(STAMP)
	$(RUN) tools/quickstart.py $(QUICKSTART_ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 --dist loadfile $(PYTEST_ARGS)

build: $(STAMP)
	$(RUN) -m fcclip.ops.build

lint: $(STAMP)
	$(RUN) -m ruff check .

demo: $(STAMP)
	$(RUN) demo/demo.py --config-file configs/shapes/fcclip_shapes.yaml --weights shapes_fcclip.safetensors \
		--input demo/images --output output/demo
	$(RUN) demo/demo.py --config-file configs/shapes/fcclip_shapes.yaml --weights shapes_fcclip.safetensors \
		--input demo/images/shapes_1.jpg --vocabulary "red circle; blue star, azure star; sand:stuff" \
		--output output/demo/vocabulary

app: $(STAMP)
	$(RUN) -m pip install --quiet --editable '.[web]'
	$(RUN) demo/app.py $(APP_ARGS)

# The stamp is written last, so an interrupted installation is taken up again instead of being used half-made.
$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, $(PYTHON) is " + sys.version.split()[0] + "; choose one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --editable '.[dev]'
	@touch $@
