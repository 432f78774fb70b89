# Everything runs in .venv, which tools/install.py makes on first use. See `make help`.
#   PYTHON=python3.12   the Python that .venv is made with
#   TORCH=cpu|cuda      torch's build (by default CUDA where there is an NVIDIA GPU)
#   RUN=python3         run with this Python as it is, and set nothing up

PYTHON ?= python3
RUN ?= .venv/bin/python

ifeq ($(RUN),.venv/bin/python)
unexport PYTHONHOME PYTHONPATH  # set for another Python, whose packages would stand before those of .venv
endif

.DEFAULT_GOAL := help
.PHONY: help setup lab test grade serve bench train chapters exercises doctor clean

help:
	@echo "make lab                   open JupyterLab at the map (JUPYTER_ARGS=\"--no-browser\" passes options)"
	@echo "make grade EX=01_numbers   grade your notebook (NB=path for one outside exercises/)"
	@echo "make serve                 a model behind OpenAI's API (MODEL=folder PORT=8000 ARGS=\"--prefix-cache hash\")"
	@echo "make doctor                what is on this machine, what is skipped here and why"
	@echo "make test                  everything that must hold: ruff, tests, every notebook, the graders"
	@echo "make bench                 measure this machine and record it under results/"
	@echo "make train                 train the checkpoint that ships with the library anew (an hour or two)"
	@echo "make chapters              re-execute notebooks and store their outputs (CH=01_numbers for one)"
	@echo "make exercises             make exercises/ from solutions/"
	@echo "make clean                 remove .venv and everything else that was made here"

setup:
ifeq ($(RUN),.venv/bin/python)
	@$(PYTHON) tools/install.py
endif

lab: setup
	@$(RUN) -m tools.lab $(JUPYTER_ARGS)

test: setup
	@$(RUN) -m tools.test $(ARGS)

grade: setup
ifndef EX
	$(error say which exercise: make grade EX=01_numbers)
endif
	@$(RUN) -m tools.grade --ex $(EX) $(if $(NB),--nb "$(NB)") || test $$? = 1

serve: setup
	@$(RUN) -m minilib.serving.server $(if $(MODEL),--model "$(MODEL)") $(if $(PORT),--port $(PORT)) $(ARGS)

bench: setup
	@$(RUN) -m tools.bench $(ARGS)

train: setup
	@$(RUN) -m tools.train $(ARGS)

chapters: setup
	@$(RUN) -m tools.chapters $(CH)

exercises: setup
	@$(RUN) -m tools.release $(EX)

doctor: setup
	@$(RUN) -m tools.doctor $(ARGS)

clean:
	rm -rf .venv build feedback .pytest_cache .ruff_cache .hypothesis .install.lock *.egg-info
