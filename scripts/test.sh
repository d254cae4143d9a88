#!/usr/bin/env bash
# Lint, type check, the site of docs/, every test. Arguments go to pytest: bash scripts/test.sh -k packing
# Needs what quickstart.sh needs, and g++ with the Python headers, with which DeepSpeed compiles its operators before
# the first run. 16 minutes on 2 CPU cores, all of it.
set -euo pipefail
# shellcheck source=scripts/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

check_basics
check_compiler
cd "$ROOT"
export PATH="$VENV/bin:$PATH" # torch looks for ninja there
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the models are tiny: tests side by side are faster than threads
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
# Compiled operators belong to one torch: they live and go with .venv.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VENV/torch_extensions}"

set_up train
build_operators & # takes minutes: beside the rest of the install, types and docs
operators=$!
trap wait EXIT # also where those fail: a build that is cut off leaves locks behind
set_up train,test,docs

step "ruff"
python -m ruff check .
python -m ruff format --check .

step "docs, in the background: the site of docs/, no dead link"
NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet &
docs=$!

step "mypy"
python -m mypy stts train

wait "$docs"
wait "$operators"
wait # for what .ci/run began
step "pytest"
python -m pytest -n 3 --dist worksteal "$@" # on two cores: some tests wait for processes of their own

step "all passed"
