# shellcheck shell=bash
# What quickstart.sh and test.sh share: checks, .venv, torch, the install. Sourced, never run.
#
# Reads:  PYTHON            the Python that makes .venv; otherwise the first of python3, python3.13, ... that is new enough
#         STTS_TORCH_INDEX  where torch comes from: the URL of a wheel index, or a folder of wheels
# Sets:   ROOT (this checkout), VENV ($ROOT/.venv); both are absolute and may contain spaces.
# Works with bash 3.2, the one that macOS ships.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

step() { printf '\n== [%d s] %s\n' "$SECONDS" "$*"; }

# fail MESSAGE...: one line per argument, then the end.
fail() {
  printf '%s\n' "$@" >&2
  exit 1
}

# fail_missing WHAT DEBIAN FEDORA MACOS: WHAT is missing; the command that brings it, per system.
fail_missing() {
  fail "$1" "  Debian, Ubuntu:  sudo apt install $2" "  Fedora:          sudo dnf install $3" "  macOS:           $4"
}

# python_version PYTHON: prints "3.11"; nothing if it does not run (version managers leave such stubs on PATH).
python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

# is_new_enough VERSION: 3.11 or later.
is_new_enough() { [ "${1%%.*}" = 3 ] && [ "${1#*.}" -ge 11 ]; }

# find_python: sets BASE_PYTHON. An existing .venv decides, then $PYTHON, then what PATH offers.
find_python() {
  local candidate version tried=""
  if [ -e "$VENV" ]; then
    version="$(python_version "$VENV/bin/python")"
    if ! is_new_enough "${version:-0.0}" || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
      fail "$VENV is not a working environment of Python 3.11 or newer with pip." \
        "Delete that folder and run this script again."
    fi
    BASE_PYTHON="$VENV/bin/python"
    return
  fi
  # python3 comes first: it is the one that an activated environment, perhaps with a torch of its own, puts on PATH.
  local candidates=(python3 python3.13 python3.12 python3.11)
  if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    version="$(python_version "$candidate")"
    if [ -n "$version" ] && is_new_enough "$version"; then
      BASE_PYTHON="$candidate"
      return
    fi
    tried="$tried $candidate (${version:-does not run}),"
  done
  fail_missing "Python 3.11 or newer is needed; found:${tried%,}. Set PYTHON to its path, or install it:" \
    "python3.11 python3.11-venv   (or python3.12, python3.13)" "python3.13" "brew install python@3.13"
}

# check_basics: what both scripts need, before anything is downloaded.
check_basics() {
  find_python
  local version
  version="$(python_version "$BASE_PYTHON")"
  if ! "$BASE_PYTHON" -c 'import ensurepip, venv' 2>/dev/null && [ ! -e "$VENV" ]; then
    fail_missing "$BASE_PYTHON ($version) cannot make environments: venv or ensurepip is missing. Install it:" \
      "python$version-venv" "python$version" "brew install python@$version"
  fi
  git --version >/dev/null 2>&1 ||
    fail_missing "git is needed and was not found. Install it:" "git" "git" "xcode-select --install"
}

# check_compiler: DeepSpeed compiles its CPU optimizer on first use, and torch includes Python.h when it does.
check_compiler() {
  g++ --version >/dev/null 2>&1 ||
    fail_missing "The tests compile C++ and g++ was not found. Install it:" "g++" "gcc-c++" "xcode-select --install"
  local version include
  version="$(python_version "$BASE_PYTHON")"
  include="$("$BASE_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
  [ -f "$include/Python.h" ] ||
    fail_missing "The tests compile against Python $version, and $include/Python.h is missing. Install it:" \
      "python$version-dev" "python3-devel   (python$version-devel if $version is not the system's)" \
      "brew install python@$version"
  # torch 2.13 quotes the include folders of an extension, but not the folder that it links against.
  case "$VENV" in
    *[[:space:]]*) fail "torch cannot link C++ extensions from a path with a space: $VENV. Move this checkout to a path without one." ;;
  esac
}

# torch_facts PYTHON: "version<TAB>CPU, CUDA x.y or ROCm x.y<TAB>site folder" of the torch that PYTHON would import;
# nothing if there is none. Reads torch/version.py, because importing torch takes seconds.
torch_facts() {
  "$1" -P - <<'PY'
import importlib.util
import pathlib
import runpy

spec = importlib.util.find_spec("torch")
if spec is not None and spec.origin is not None:
    package = pathlib.Path(spec.origin).parent
    facts = runpy.run_path(str(package / "version.py"))
    build = "CPU"
    for name in ("CUDA", "ROCm"):
        if found := facts.get({"CUDA": "cuda", "ROCm": "hip"}[name]):
            build = f"{name} {found}"
    print(facts["__version__"], build, package.parent, sep="\t")
PY
}

# torch_in_range VERSION: does pyproject.toml accept this torch? Asked in .venv, whose pip brings the version rules.
torch_in_range() {
  "$VENV/bin/python" -P - "$ROOT/pyproject.toml" "$1" <<'PY'
import sys
import tomllib

from pip._vendor.packaging.requirements import Requirement

with open(sys.argv[1], "rb") as file:
    dependencies = [Requirement(line) for line in tomllib.load(file)["project"]["dependencies"]]
(torch,) = [one for one in dependencies if one.name == "torch"]
sys.exit(not torch.specifier.contains(sys.argv[2], prereleases=True))
PY
}

# report_wants_cuda FILE: does a torch in this pip report bring CUDA libraries on this machine?
report_wants_cuda() {
  "$VENV/bin/python" -P - "$1" <<'PY'
import json
import sys

from pip._vendor.packaging.requirements import Requirement

with open(sys.argv[1], encoding="utf-8") as file:
    chosen = json.load(file)["install"]
needs = [Requirement(line) for one in chosen for line in one["metadata"].get("requires_dist", [])]
needs = [one.name for one in needs if one.marker is None or one.marker.evaluate({"extra": ""})]
sys.exit(not any(name.startswith(("nvidia-", "cuda-")) for name in needs))
PY
}

has_nvidia_gpu() { command -v nvidia-smi >/dev/null 2>&1 || [ -e /dev/nvidia0 ] || [ -e /dev/nvidiactl ]; }

# pip_install ARGUMENTS...: with bars on a terminal, only errors in a log. Python compiles a module when it is first
# imported: compiling all of them here takes as long as the rest of the install.
pip_install() {
  local options=(--no-compile --constraint "$VENV/constraints.txt")
  [ -t 1 ] || options+=(--quiet --quiet)
  "$VENV/bin/python" -m pip --disable-pip-version-check install "${options[@]}" "$@"
}

# make_venv: makes .venv if missing. A torch beside the chosen Python becomes visible in it through a .pth file:
# unlike --system-site-packages, that also works when the chosen Python belongs to an environment itself.
make_venv() {
  [ -e "$VENV" ] && return
  step "making $VENV with $BASE_PYTHON ($(python_version "$BASE_PYTHON"))"
  "$BASE_PYTHON" -m venv "$VENV" || { rm -rf "$VENV"; fail "$BASE_PYTHON -m venv failed: see above."; }
  # Somebody who names an index wants that torch, not the one that lies around.
  [ -z "${STTS_TORCH_INDEX:-}" ] || return 0
  local version build site
  IFS=$'\t' read -r version build site < <(torch_facts "$BASE_PYTHON") || return 0
  if ! torch_in_range "$version"; then
    echo "Not reusing torch $version of $BASE_PYTHON: outside the range in pyproject.toml."
  elif "$BASE_PYTHON" -P -c 'import torch' >/dev/null 2>&1; then
    echo "Reusing torch $version of $BASE_PYTHON."
    echo "$site" >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/reused-torch.pth"
  fi
}

# pins: the versions that pip is held to.
pins() { cat "$ROOT/constraints.txt"; }

# install_torch: keeps a torch that .venv already sees, otherwise installs one; leaves $VENV/constraints.txt for pip.
install_torch() {
  local version build site source=() report
  pins >"$VENV/constraints.txt"
  if IFS=$'\t' read -r version build site < <(torch_facts "$VENV/bin/python") && torch_in_range "$version"; then
    if [ "${version%%+*}" != "$(sed -n 's/^torch==//p' "$ROOT/constraints.txt")" ]; then
      # Another torch than the pinned one stays; pip then looks for the torchvision that goes with it.
      { pins | grep -vE '^torch(vision)?==' && echo "torch==$version"; } >"$VENV/constraints.txt"
    fi
    [ -z "${STTS_TORCH_INDEX:-}" ] || echo "STTS_TORCH_INDEX is not used: .venv has torch $version. Delete .venv to change it."
    return
  fi
  case "${STTS_TORCH_INDEX:-}" in
    "") ;;
    *://*) source=(--index-url "$STTS_TORCH_INDEX") ;;
    *) [ -d "$STTS_TORCH_INDEX" ] ||
      fail "STTS_TORCH_INDEX=$STTS_TORCH_INDEX is neither a URL nor a folder; give the URL of a wheel index or a folder of wheels."
      source=(--find-links "$STTS_TORCH_INDEX") ;;
  esac
  # "${a[@]+"${a[@]}"}": bash 3.2 calls an empty array unset.
  if [ "$(uname -s)" = Linux ] && ! has_nvidia_gpu; then
    report="$VENV/torch-report.json"
    if pip_install "${source[@]+"${source[@]}"}" --quiet --dry-run --no-deps --report "$report" torch 2>/dev/null &&
      report_wants_cuda "$report"; then
      echo "This machine shows no NVIDIA GPU, and pip is about to fetch a CUDA build of torch: several GB."
      echo "For the CPU build stop now (Ctrl-C), delete .venv and run this script again with"
      echo "  STTS_TORCH_INDEX=https://download.pytorch.org/whl/cpu"
    fi
    rm -f "$report"
  fi
  step "installing torch"
  pip_install "${source[@]+"${source[@]}"}" torch torchvision
}

# set_up EXTRAS: .venv with the project and these extras, e.g. "fit" or "train,test". Does nothing when the last
# install is still good: same checkout, same pyproject.toml, same constraints.txt.
set_up() {
  local stamp state version build site size
  stamp="$VENV/installed-${1//,/-}"
  state="$ROOT $(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
    make_venv
    install_torch
    step "installing stts-video[$1]"
    pip_install --editable "${ROOT}[$1]"
    echo "$state" >"$stamp"
  fi
  IFS=$'\t' read -r version build site < <(torch_facts "$VENV/bin/python") || fail "$VENV has no torch: delete it and run again."
  # The CUDA libraries lie beside torch and are most of its size.
  size="$({ du -shc "$site/torch" "$site/nvidia" "$site/triton" 2>/dev/null || true; } | tail -n 1 | cut -f 1)"
  echo "torch $version ($build), $size in $site"
}

# build_operators: DeepSpeed compiles operators on first use, and whoever starts meanwhile waits for minutes, or for ever
# if the build was killed. Here each is compiled, and used once in a process whose exit code counts. The logs stay in
# $TORCH_EXTENSIONS_DIR. Does nothing when they belong to this torch, this DeepSpeed and this CPU already.
build_operators() {
  local stamp="$TORCH_EXTENSIONS_DIR/built" state name log builders=(ShareMemCommBuilder CPUAdamBuilder) builds=()
  state="$("$VENV/bin/python" -c 'import platform, sys
from importlib.metadata import version
print(sys.version_info[:2], *map(version, ("torch", "deepspeed")), platform.machine())')"
  state="$state $(grep -m 1 "^model name" /proc/cpuinfo 2>/dev/null || true)" # compiled with -march=native
  [ "$(cat "$stamp" 2>/dev/null)" = "$state" ] && return
  mkdir -p "$TORCH_EXTENSIONS_DIR"
  rm -f "$TORCH_EXTENSIONS_DIR"/*/lock # of builds that were killed
  step "compiling DeepSpeed's operators (logs in $TORCH_EXTENSIONS_DIR)"
  for name in "${builders[@]}"; do
    build_operator "$name" >"$TORCH_EXTENSIONS_DIR/$name.log" 2>&1 &
    builds+=($!)
  done
  for name in "${!builders[@]}"; do
    wait "${builds[name]}" && continue
    log="$TORCH_EXTENSIONS_DIR/${builders[name]}.log"
    tail -n 30 "$log" >&2
    fail "${builders[name]} did not compile or did not work: the end of $log is above."
  done
  echo "$state" >"$stamp"
}

# build_operator BUILDER: one of them.
build_operator() {
  DS_ACCELERATOR=cpu "$VENV/bin/python" -P - "$1" <<'PY'
import sys

import torch
from deepspeed.accelerator import get_accelerator

operator = get_accelerator().create_op_builder(sys.argv[1]).load(verbose=True)
if sys.argv[1] == "CPUAdamBuilder":
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 1000)) for _ in range(2))
    steps = DeepSpeedCPUAdam([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1, weight_decay=0)
    for parameter, optimizer in zip((ours, theirs), steps):
        parameter.grad = parameter.detach() ** 3
        optimizer.step()
    torch.testing.assert_close(ours, theirs)
print("compiled and used:", operator)
PY
}
