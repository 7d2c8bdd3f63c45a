#!/usr/bin/env bash
# Checks this project on a machine with one NVIDIA GPU (an H100 or H200), within 9 minutes: what is equal there, and how fast it is.
#
#   tools/gpu_check.sh                           results in $OUT if that is set, else in outputs/gpu_check
#   tools/gpu_check.sh --cpu                     every stage at toy size without a GPU: whether the check itself runs
#   tools/gpu_check.sh --wheels .whl             what a bare machine with PyTorch lacks, as wheels for Python 3.12 on x86-64
#   tools/gpu_check.sh --page FILE               the page of an earlier check from its gpu_check.jsonl, in benchmarks/
#
#   --out FOLDER          where results go
#   --stages NAME ...     only these, of install ceilings correctness debug_gpu moe 1b
#
# Every stage is a process with a time limit of its own. What it finds it appends at once to gpu_check.jsonl; what it prints is in
# gpu_check.log. A stage that fails or takes too long does not stop the next; the last line says which passed. The page of the results,
# gpu_DEVICE_YYYYMM.md, lies beside them: commit it under benchmarks/.
#
# A bare machine needs Python 3.12 with torch from 2.11 up to 2.13 and transformers. What else is missing is installed from wheels in
# the folder .whl of the repository, outside of the machine's environment, or named by the stage install.
#
#   SYMBIOTIC_PYTHON=PATH  use this Python; default: the .venv of the repository if there is one, else python3
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
began=$SECONDS
fail() { printf 'gpu_check.sh: %s\n' "$*" >&2; exit 2; }

# Neither part of PyTorch's usual images nor brought by them: torchtitan's trainer imports datasets, which imports the last three.
wheels=(torchtitan==0.2.2 torchao==0.18.0 torchdata==0.11.0 datasets==5.2.0 'docstring-parser>=0.16,<1' 'tyro>=0.9,<2' 'tomli>=2.0,<3'
    'typeguard>=4,<5' 'dill>=0.3,<0.5' 'multiprocess>=0.70,<0.71' 'xxhash>=3,<4')

python=${SYMBIOTIC_PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    if [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
fi

if [ "${1:-}" = --wheels ]; then
    [ $# -eq 2 ] || fail "--wheels needs one folder: tools/gpu_check.sh --wheels .whl"
    platforms=()
    for glibc in 2_28 2_27 2_17 2_24 2_34; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
        --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --dest "$2" "${wheels[@]}"
    kilobytes=$(du -sk "$2" | cut -f1)
    [ "$kilobytes" -le 65536 ] || fail "--wheels $2: $kilobytes KiB, more than the 64 MiB that travel; empty the folder first"
    printf 'gpu_check.sh: %s wheels, %s KiB in %s\n' "$(find "$2" -name '*.whl' | wc -l)" "$kilobytes" "$2"
    exit
fi

case " $* " in
    *" --cpu "* | *" --page "* | *" --help "* | *" -h "*) ;;
    *) nvidia-smi -L >/dev/null 2>&1 || fail "there is no NVIDIA GPU here; --cpu runs every stage at toy size without one" ;;
esac
path=$root:$root/tools/bench
site=
if compgen -G "$root/.whl/*.whl" >/dev/null && ! "$python" -c 'import torchtitan' 2>/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    # Compiled as well: Python warns of a string in torchao when it compiles it, and tests turn warnings into errors.
    timeout 30 "$python" -m pip install --quiet --no-index --no-deps --disable-pip-version-check --no-warn-script-location \
        --root-user-action ignore --target "$site" "$root"/.whl/*.whl || printf 'gpu_check.sh: the wheels in .whl could not be installed\n' >&2
    path=$path:$site
fi
export PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TQDM_DISABLE=1
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
"$python" "$root/tools/gpu_check/gpu_check.py" --spent $((SECONDS - began)) "$@"
