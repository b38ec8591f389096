# What a developer or a curious visitor does with imgfs. Settings of the tools live in pyproject.toml.

# The distribution's own Python if it is new enough: it is built with profile-guided optimisation, which others often are
# not, and those take 1.4 times as long for all that imgfs does.
OWN := /usr/bin/python3
PYTHON ?= $(shell $(OWN) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(OWN) || echo python3)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help run stop test soak soak-mount soak-fuzz check lint types imports format bench bench-quick install-system clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

run: .venv/imgfs-ready ## mount a store with sample photos at run/mnt
	@scripts/run.sh

stop: ## unmount what `make run` mounted
	@scripts/stop.sh

test: .venv/test-ready ## run all tests
	@scripts/test.sh

soak: .venv/test-ready ## what a crash, damage or any use may do, at length (half an hour, 20 GB)
	@IMGFS_SOAK=4 scripts/test.sh --timeout 3600 tests/test_crash_matrix.py tests/test_index_damage.py \
		tests/test_torn_or_corrupt.py tests/test_damage_to_others.py \
		tests/test_file_model.py tests/test_tree_model.py

soak-mount: .venv/test-ready ## kill what serves a mount, under load, minutes for each way (20 minutes)
	@IMGFS_SOAK=2 scripts/test.sh tests/test_survival.py

soak-fuzz: .venv/test-ready ## a million stores with any damage; FROM=, COUNT=, JOBS= (1.5 hours on 2 cores)
	@$(BIN)/python tests/fuzzing.py $(if $(FROM),--from $(FROM)) $(if $(COUNT),--count $(COUNT)) $(if $(JOBS),--jobs $(JOBS))

check: lint types imports ## lint, types and imports

lint: .venv/imgfs-ready ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/imgfs-ready ## mypy --strict
	$(BIN)/mypy

imports: .venv/imgfs-ready ## the layers, as pyproject.toml declares them
	$(BIN)/lint-imports

format: .venv/imgfs-ready ## let ruff format the code
	$(BIN)/ruff format .

bench: .venv/bench-ready ## measure everything that the docs claim, beside others (40 minutes, 20 GB)
	scripts/as_root $(BIN)/python -m bench

bench-quick: .venv/bench-ready ## the same with small numbers; docs/ stays as it is (3 minutes)
	scripts/as_root $(BIN)/python -m bench --quick

install-system: .venv/imgfs-ready ## install imgfs for systemd and fstab, see systemd/README.md
	@PYTHON=$(PYTHON) scripts/install-system.sh

clean: stop ## stop, and delete everything make has made, also the photos in run/
	@scripts/clean.sh

.venv/imgfs-ready: pyproject.toml scripts/install.sh
	@PYTHON=$(PYTHON) scripts/install.sh

.venv/test-ready: .venv/imgfs-ready
	@scripts/install.sh test

.venv/bench-ready: .venv/imgfs-ready
	@scripts/install.sh bench
