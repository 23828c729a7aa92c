# What is typed in a checkout of tproxyd. Each target works as the first one after `git clone`: it makes .venv, and as root
# installs the Debian packages that are missing. Nothing here touches the host's network.

export PYTHON ?= python3
PREPARE := packaging/prepare
AS_OWNER := $(PREPARE) --as-owner
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
# Most tests wait more than they compute. One test is handed out at a time, because some take a hundred times as long as others.
PARALLEL := -n 4 --maxschedchunk 1
# Some of the tests: sudo make nstest TESTS="netns_tests/test_capture.py -k foreign"
TESTS ?=
PEERS := nft ip curl openssl iperf3 gcc haproxy nginx systemd
RIVALS := nft ip gcc haproxy nginx
# Some of the benchmark: sudo make bench ONLY="bulk small", and further options: BENCH="--rounds 9"
ONLY ?=
BENCH ?=
# Where `make install` puts it; DESTDIR=/somewhere for the root of another system. A Python of your own: INSTALL_PYTHON=/usr/bin/python3.12
export PREFIX ?= /usr/local
export DESTDIR ?=
export INSTALL_PYTHON ?=
SYSTEM_PYTHON := $(or $(INSTALL_PYTHON),/usr/bin/python3)
# As root in somebody's checkout nothing may be written that they cannot remove.
export PYTHONDONTWRITEBYTECODE := 1

# Expanded before the first line of a recipe runs: one sentence, and nothing has happened yet.
need-root = $(if $(filter 0,$(shell id -u)),,$(error make $@ needs root: type `sudo make $@`))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv install uninstall demo pictures nstest nstest-long bench bench-quick test check format docs lock dist deb deb-test clean

help:  ## what can be typed here
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{ printf "make %-13s %s\n", $$1, $$2 }'

venv:  ## .venv with tproxyd in it: .venv/bin/tproxyd
	@$(PREPARE)

install:  ## tproxyd for this machine, below PREFIX=/usr/local; it captures nothing until told to (root)
	$(if $(DESTDIR),,$(need-root))
	@PYTHON=$(SYSTEM_PYTHON) $(PREPARE) --programs nft
	@packaging/install

uninstall:  ## stops it, puts the kernel's state back, removes what `make install` brought but for /etc/tproxyd (root)
	$(if $(DESTDIR),,$(need-root))
	@packaging/install --remove

demo:  ## the main job at work, in throwaway network namespaces (root)
	$(need-root)
	@$(PREPARE) nft curl openssl
	@$(BIN)/python -m tproxyd.testing.demo

pictures:  ## docs/demo.svg and docs/top.svg anew (root)
	$(need-root)
	@$(PREPARE) nft curl openssl
	@$(BIN)/python packaging/pictures.py
	@chown --reference=docs docs/*.svg

nstest:  ## every test, in throwaway network namespaces; counted runs divided by 10 (root)
	$(need-root)
	@$(PREPARE) $(PEERS)
	$(PYTEST) $(PARALLEL) $(TESTS)

nstest-long:  ## the same with full counts (root)
	$(need-root)
	@$(PREPARE) $(PEERS)
	$(PYTEST) $(PARALLEL) --count-divisor 1 $(TESTS)

bench:  ## tproxyd beside HAProxy, nginx, Envoy and a C relay: about 17 minutes, results in bench/results (root)
	$(need-root)
	@$(PREPARE) --bench $(RIVALS)
	$(BIN)/python -m bench $(ONLY) $(BENCH)

bench-quick:  ## the goals that a change of the data path may miss, in less than 5 minutes (root)
	$(need-root)
	@$(PREPARE) --bench $(RIVALS)
	$(BIN)/python -m bench --quick $(ONLY) $(BENCH)

test:  ## the tests that need no root
	@$(PREPARE)
	$(PYTEST) netns_tests/unit

check:  ## format, lint, types, layers
	@$(PREPARE)
	$(AS_OWNER) $(BIN)/ruff format --check
	$(AS_OWNER) $(BIN)/ruff check
	$(AS_OWNER) $(BIN)/mypy
	$(PYTEST) -q netns_tests/unit/test_layers.py

format:  ## rewrites the code as `make check` wants it
	@$(PREPARE)
	$(AS_OWNER) $(BIN)/ruff format
	$(AS_OWNER) $(BIN)/ruff check --fix

docs:  ## the references that are made from the config types: docs/configuration.md and its like
	@$(PREPARE)
	$(AS_OWNER) $(BIN)/python packaging/generate docs

# With new versions of everything; with those that stand in the locks unless something asks for others: make lock UPGRADE=
UPGRADE := --upgrade
COMPILE := $(AS_OWNER) $(BIN)/uv pip compile -q $(UPGRADE) --universal --generate-hashes --no-emit-index-url --no-emit-find-links \
    --python-version 3.11 --custom-compile-command "make lock"

lock:  ## requirements.lock, requirements-dev.lock and requirements-bench.lock anew, from pyproject.toml
	@$(PREPARE)
	$(COMPILE) --group dev -o requirements-dev.lock pyproject.toml
	$(COMPILE) --group bench -o requirements-bench.lock
	$(COMPILE) --extra top -c requirements-dev.lock -o requirements.lock pyproject.toml

dist:  ## wheel and source archive, in dist
	@$(PREPARE)
	$(AS_OWNER) $(BIN)/hatchling build

deb:  ## Debian package for this machine's release and architecture, in dist
	@PYTHON=/usr/bin/python3 $(PREPARE) --programs strip
	@$(AS_OWNER) packaging/deb

deb-test: deb dist  ## installs, runs, upgrades, purges what `make deb` and `make dist` build, in a throwaway Debian (root, network)
	$(need-root)
	@$(PREPARE) --programs lintian mandoc groff zsh fish debootstrap
	@packaging/deb-test

clean:  ## removes what the other targets made
	rm -rf .venv .venv-bench .mypy_cache .ruff_cache .hypothesis dist
