# One command for each habit. Each target says what it does in `make help`, and needs nothing before it.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup build check test demo demo-mesh lint fmt doc bench bench-link matrix soak interop fuzz loom clean

# rustup's cargo need not be in PATH yet.
export PATH := $(PATH):$(HOME)/.cargo/bin

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: ## install what is missing (Debian: by apt)
	@sh scripts/setup

build: setup ## native library and Erlang code, in _build/default/lib/macula
	@sh scripts/build

test: ## all that CI runs, with a summary: lints, Rust, EUnit, Common Test ...
	@sh scripts/setup test
	@sh scripts/test

check: setup ## for everyday work, in minutes: formats, clippy, xref, unit tests, some cases of each layer
	@sh scripts/test check

demo: build ## four nodes cluster over QUIC, to look at; under a minute
	@sh scripts/demo

demo-mesh: build ## five VMs with signed links to each other, to look at; under half a minute
	@sh scripts/demo-mesh

lint: setup ## formats, clippy, xref, Dialyzer
	@sh scripts/test lint

fmt: setup ## format the Rust code; strip trailing blanks elsewhere
	@sh scripts/fmt

doc: build ## API documentation in doc/index.html
	@rebar3 edoc && echo "doc/index.html"

bench: build ## beside inet_tcp, inet_tls, bare quinn; into bench/results
	@sh scripts/bench

bench-link: build ## a conversation beside bulk on an emulated line (Linux, as root); into bench/results
	@sh scripts/bench-link

matrix: build ## OTP 27 and 29 in Debian chroots (needs root and the network)
	@sh scripts/matrix

soak: build ## nodes under load on a bad network, MACULA_SOAK_MINUTES (10)
	@sh scripts/soak

interop: setup ## against aioquic, quiche and s2n-quic; table in docs/interop.md (needs the network once)
	@sh scripts/interop

fuzz: build ## properties (MACULA_PROPER_TESTS), decoders (MACULA_FUZZ_RUNS), peers (MACULA_TALK_INPUTS)
	@MACULA_PROPER_TESTS=$${MACULA_PROPER_TESTS:-10000} sh scripts/test properties
	@for decoder in frame lane packet probe key address late ticket; do sh scripts/fuzz $$decoder || exit 1; done
	@sh scripts/fuzz talk

loom: setup ## hand-overs between threads in every order, LOOM_MAX_PREEMPTIONS (3)
	@sh scripts/loom

clean: ## remove what was built
	rm -rf _build target doc logs priv/*.so priv/*.so.tmp erl_crash.dump rebar3.crashdump
