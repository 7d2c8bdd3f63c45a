#!/usr/bin/env bash
# Makes the environment of this project (.venv in the repository) and prints the path of its Python.
#
#   tools/setup_env.sh
#
# A second call returns at once unless pyproject.toml or this script has changed. An unfinished .venv is completed.
# An environment that is already active, and has torch and torchtitan, is used as it is.
#
#   SYMBIOTIC_PYTHON=PATH  use this Python, as it is, instead of a .venv
#   PYTHON=PATH            the Python (3.11 or 3.12) that the .venv is made from
#   SYSTEM_TORCH=1         let the .venv see that Python's packages and keep its torch (clusters)
#   TORCH_BUILD=cpu|cuda   which build of torch to install; default: cuda where `nvidia-smi -L` finds a GPU
#   TORCH_SPEC=SPEC        what to ask pip for; default: torch==2.13.0 (cpu), torch>=2.11,<2.14 (cuda)
#   TORCH_PIP_ARGS=ARGS    more arguments for pip when it installs torch, for instance an index of CPU or ROCm
#                          builds: PyTorch's installation page gives the address of each
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/setup_env.stamp
log=$venv/setup_env.log
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf 'setup_env.sh: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

# step WORDS COMMAND...: runs the command with its output in the log, and prints one line.
step() {
    local words=$1 start=$SECONDS
    shift
    printf 'setup_env.sh: %s ... ' "$words" >&2
    if ! "$@" >>"$log" 2>&1; then
        printf 'failed\n' >&2
        tail -n 20 "$log" >&2
        fail "could not finish: $words. The whole log: $log"
    fi
    printf '%s s\n' $((SECONDS - start)) >&2
}

has_packages() {
    "$1" -c 'import sys; from importlib.util import find_spec; sys.exit(not (find_spec("torch") and find_spec("torchtitan")))' \
        >/dev/null 2>&1
}

# Python 3.11 or 3.12 that can make environments. It is run, not only looked up: version managers leave dead names on PATH.
is_suitable() {
    "$1" -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

find_base_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python}; do
        if is_suitable "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or 3.12 with its venv module (a package of its own on Debian and Ubuntu: python3-venv);" \
        "tried: ${PYTHON:-python3 python3.12 python3.11 python}. Name one with PYTHON=PATH."
}

# The torch of a Python as "VERSION BUILD"; fails unless it imports and this project supports it.
torch_of() {
    "$1" -c '
import torch
assert (2, 11) <= tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 14), torch.__version__
print(torch.__version__, "cuda" if torch.version.cuda or torch.version.hip else "cpu")' 2>&1 | tail -n 1
}

# CUDA packages that the torch pip would choose asks for, without downloading it. A wheel with CUDA inside cannot be
# imported without them, so leaving them out is no way to make it small.
cuda_packages_of() {
    # shellcheck disable=SC2086  # the arguments are meant to be split
    "$venv/bin/python" -m pip install --quiet --dry-run --no-deps --ignore-installed --report - ${TORCH_PIP_ARGS:-} "$1" \
        2>>"$log" | "$venv/bin/python" -c '
import json, sys
from pip._vendor.packaging.requirements import Requirement
wanted = [Requirement(r) for p in json.load(sys.stdin)["install"] for r in p["metadata"].get("requires_dist", [])]
wanted = [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
print(*(name for name in wanted if name.startswith(("nvidia", "cuda"))))'
}

install_torch() {
    local build=$1 spec cuda_packages installed
    installed=$(torch_of "$venv/bin/python") || installed="none none"
    if [ "${SYSTEM_TORCH:-}" = 1 ]; then return; fi
    if [ -z "${TORCH_SPEC:-}" ] && { [ "${installed#* }" = cuda ] || [ "${installed#* }" = "$build" ]; }; then
        return
    fi
    if [ "$build" = cuda ]; then
        spec=${TORCH_SPEC:-torch>=2.11,<2.14}
    else
        spec=${TORCH_SPEC:-torch==2.13.0}
        cuda_packages=$(cuda_packages_of "$spec") || fail "pip finds no $spec; the log: $log"
        [ -z "$cuda_packages" ] || fail "there is no NVIDIA GPU here, but pip offers only a CUDA build of $spec" \
            "(several GB). Name PyTorch's index of CPU builds, whose address is on PyTorch's installation page:" \
            "TORCH_PIP_ARGS='-i ADDRESS'. Or take the CUDA build: TORCH_BUILD=cuda."
    fi
    # pip takes a torch of the right version for the right one, whatever its build.
    "$venv/bin/python" -m pip uninstall --quiet --yes torch >>"$log" 2>&1
    # shellcheck disable=SC2086
    step "torch ($spec, $build build)" "$venv/bin/python" -m pip install --quiet ${TORCH_PIP_ARGS:-} "$spec"
}

# 1. An environment that exists already.
if [ -n "${SYMBIOTIC_PYTHON:-}" ]; then
    python=$(command -v "$SYMBIOTIC_PYTHON") || fail "SYMBIOTIC_PYTHON: there is no program $SYMBIOTIC_PYTHON"
    has_packages "$python" || fail "SYMBIOTIC_PYTHON: $python has no torch and torchtitan;" \
        "install with: $python -m pip install -e '.[demo,dev,docs,plot]'"
    case $python in /*) ;; *) python=$PWD/$python ;; esac
    printf '%s\n' "$python"
    exit
fi
if [ -n "${VIRTUAL_ENV:-}" ] && [ "$VIRTUAL_ENV" != "$venv" ]; then
    if has_packages "$VIRTUAL_ENV/bin/python"; then
        printf '%s\n' "$VIRTUAL_ENV/bin/python"
        exit
    fi
    say "the active environment ($VIRTUAL_ENV) has no torch and torchtitan; using $venv instead"
fi

# 2. A finished .venv. The stamp holds what it was made from, where (environments cannot be moved), and with which settings.
made_from="$(cat "$root/pyproject.toml" "$root/tools/setup_env.sh" | cksum | tr -d '\n') $root"
settings="${PYTHON:-}|${TORCH_SPEC:-}|${TORCH_BUILD:-}|${SYSTEM_TORCH:-}"
if [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(sed -n 1p "$stamp")" = "$made_from" ]; then
    if [ "$settings" = "|||" ] || [ "$(sed -n 2p "$stamp")" = "$settings" ]; then
        printf '%s\n' "$venv/bin/python"
        exit
    fi
fi

# 3. Make or complete it.
build=${TORCH_BUILD:-}
if [ -z "$build" ]; then
    if nvidia-smi -L >/dev/null 2>&1; then build=cuda; else build=cpu; fi
fi
case $build in cpu | cuda) ;; *) fail "TORCH_BUILD must be cpu or cuda, got: $build" ;; esac

# Reasons to begin anew: another Python is asked for, the folder was moved, or the environment is broken.
anew=${PYTHON:-}${SYSTEM_TORCH:-}
if [ -f "$stamp" ] && [ "$(sed -n '1s/^[0-9]* [0-9]* //p' "$stamp")" != "$root" ]; then anew=1; fi
if [ -n "$anew" ] || ! is_suitable "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    base=$(find_base_python)
    flags=
    if [ "${SYSTEM_TORCH:-}" = 1 ]; then
        flags=--system-site-packages
        found=$(torch_of "$base") || fail "SYSTEM_TORCH=1: $base has no torch from 2.11 up to 2.13 ($found)." \
            "Name another Python with PYTHON=PATH, or unset SYSTEM_TORCH."
    fi
    say "making $venv with $("$base" --version)"
    "$base" -m venv --clear $flags "$venv" || fail "$base could not make $venv"
fi
rm -f "$stamp"
: >"$log"
install_torch "$build"
torch=$(torch_of "$venv/bin/python") || fail "the installed torch does not import or is not from 2.11 up to 2.13 ($torch)." \
    "Remove $venv, set TORCH_BUILD, TORCH_SPEC or TORCH_PIP_ARGS (see the top of this script) and run it again."
# Nothing that is installed next may replace torch by another build.
printf 'torch==%s\n' "${torch% *}" >"$venv/constraints.txt"
step "this project and its tools" \
    "$venv/bin/python" -m pip install --quiet -c "$venv/constraints.txt" -e "$root[demo,dev,docs,plot]"
printf '%s\n%s\n' "$made_from" "$settings" >"$stamp"
say "ready in $SECONDS s: $("$venv/bin/python" --version), torch ${torch% *}, $(du -sh "$venv" | cut -f1)"
printf '%s\n' "$venv/bin/python"
