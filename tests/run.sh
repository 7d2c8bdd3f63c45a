#!/usr/bin/env bash
# Checks the project: lint, types, then the tests.
#
#   tests/run.sh                everything but tests marked slow, with the time of each stage
#   tests/run.sh -k router      only pytest, with these arguments
#
# Makes the environment when it is missing (tools/setup_env.sh). Every stage runs; one that fails fails the whole.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$("$root/tools/setup_env.sh")
cd "$root"
# One thread: the tests are many and small, and distributed tests share the cores between processes.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if [ $# -gt 0 ]; then
    exec "$python" -m pytest "$@"
fi

failed=
stage() { # stage NAME COMMAND...
    local name=$1 start=$SECONDS result=passed
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    if ! "$python" -m "$@"; then
        result=FAILED
        failed="$failed $name"
    fi
    printf '== %s %s in %s s\n' "$name" "$result" $((SECONDS - start))
}

stage lint ruff check .
stage format ruff format --check .
stage spelling codespell_lib .
# Types are checked beside the tests, which often wait for something.
types=$(mktemp)
trap 'rm -f "$types"' EXIT
"$python" -m mypy >"$types" 2>&1 &
mypy=$!
# Whole files side by side: tests of one file share what they set up. Those of whole runs come first, because they last longest.
workers=$("$python" -c 'import os; print(min(os.cpu_count() or 1, 8))')
stage tests pytest -q -n "$workers" --dist loadfile --no-loadscope-reorder \
    tests/integration tests/distributed tests/unit tests/contract
if nvidia-smi -L >/dev/null 2>&1; then
    stage gpu pytest -q -m "gpu and not slow" tests
fi

if wait "$mypy"; then result=passed; else result=FAILED failed="$failed types"; fi
printf '\n== types: mypy\n%s\n== types %s\n' "$(cat "$types")" "$result"

if [ -n "$failed" ]; then
    printf '\ntests/run.sh: failed:%s (%s s)\n' "$failed" "$SECONDS"
    exit 1
fi
printf '\ntests/run.sh: all passed (%s s)\n' "$SECONDS"
