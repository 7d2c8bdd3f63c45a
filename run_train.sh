#!/usr/bin/env bash
# Trains the model of a config file, in torchtitan's manner:
#
#   ./run_train.sh [--section.key value ...]      for instance: NGPU=2 ./run_train.sh --training.steps 50
#
#   CONFIG_FILE=FILE  default train_configs/debug.toml; looked for in the current directory, then in the repository
#   NGPU=N            processes on this machine, default 1: one per GPU, or gloo processes where there is no GPU
#   LOG_RANK=R[,R]    ranks whose output is shown when there are several, default 0
#   NNODES=M RDZV_ENDPOINT=HOST:PORT   several machines: start this on each of them (RDZV_ID names the job)
#   RDZV_TIMEOUT=S    seconds to wait for all machines, default 600; then status 75
#   MAX_RESTARTS=N    how often several processes start again from the newest checkpoint when one crashes or is killed, default 0
#   SYMBIOTIC_PYTHON=PATH              use this Python instead of making a .venv (see tools/setup_env.sh)
#
# The environment and the demo data are made when they are missing. Paths in configs and options are relative to the
# repository, wherever this is called from.
set -euo pipefail

caller=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NGPU=${NGPU:-1}
NNODES=${NNODES:-1}
LOG_RANK=${LOG_RANK:-0}
RDZV_TIMEOUT=${RDZV_TIMEOUT:-600}
MAX_RESTARTS=${MAX_RESTARTS:-0}
CONFIG_FILE=${CONFIG_FILE:-train_configs/debug.toml}

fail() { printf 'run_train.sh: %s\n' "$*" >&2; exit 2; }
is_count() { case $1 in '' | *[!0-9]* | 0*) return 1 ;; esac; }

is_count "$NGPU" || fail "NGPU must be a positive integer, got: $NGPU"
is_count "$NNODES" || fail "NNODES must be a positive integer, got: $NNODES"
is_count "$RDZV_TIMEOUT" || fail "RDZV_TIMEOUT must be a positive number of seconds, got: $RDZV_TIMEOUT"
[ "$MAX_RESTARTS" = 0 ] || is_count "$MAX_RESTARTS" || fail "MAX_RESTARTS must be a number of restarts, got: $MAX_RESTARTS"
case $LOG_RANK in '' | *[!0-9,]*) fail "LOG_RANK must be numbers of ranks with commas between them, got: $LOG_RANK" ;; esac
if [ "$NNODES" -gt 1 ] && [ -z "${RDZV_ENDPOINT:-}" ]; then
    fail "NNODES=$NNODES needs RDZV_ENDPOINT=HOST:PORT, the same on every machine"
fi
wants_help=
for argument in "$@"; do
    case $argument in
        -h | --help)
            sed -n '2,/^set /s/^# \{0,1\}//p' "$root/run_train.sh"
            printf '\n'
            sed -n '/^MOST_USED = /,/^"""$/{//!p;}' "$root/symbiotic_titan/cli.py"
            exit ;;
        --help-all) wants_help=1 ;;
        --job.config_file* | --job.config-file*) fail "name the config with CONFIG_FILE=FILE, not with $argument" ;;
    esac
done
case $CONFIG_FILE in
    /*) config=$CONFIG_FILE ;;
    *) if [ -f "$caller/$CONFIG_FILE" ]; then config=$caller/$CONFIG_FILE; else config=$root/$CONFIG_FILE; fi ;;
esac
[ -f "$config" ] || fail "CONFIG_FILE: no such file: $CONFIG_FILE (looked in $caller and $root)"

# Until the trainer runs, which handles them itself. (A SIGHUP that nohup ignores cannot be trapped.)
stopped() {
    [ -z "${helper:-}" ] || kill "$helper" 2>/dev/null || true
    printf 'SIG%s: stopped before the first step\n' "$1" >&2
    exit 0
}
for name in INT TERM HUP USR1; do trap "stopped $name" "$name"; done

python=$("$root/tools/setup_env.sh")
cd "$root"
config=${config#"$root"/}
export PYTHONUNBUFFERED=1 PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if [ -n "$wants_help" ]; then
    exec "$python" -m symbiotic_titan.train --job.config_file "$config" --help
fi

if nvidia-smi -L >/dev/null 2>&1; then
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
else
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    threads=$((cores / NGPU))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    # Threads that spin while they wait make a shared machine 10 times slower; threads that sleep at once need longer to wake than most
    # operations of a small model take. So they spin for a few microseconds.
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
fi

if [ "$NNODES" -eq 1 ] && [ ! -e demo_data ]; then
    merged=$("$python" -P symbiotic_titan/config/extends.py "$config") # the config and all that it extends
    if grep -q '["/]demo_data/' <<<"$merged"; then
        printf 'run_train.sh: writing the demo data to demo_data\n' >&2
        "$python" tools/make_demo_data.py --out demo_data &
        helper=$! # waited for, since bash answers a signal only when a command in the foreground has ended
        wait "$helper"
        helper=
    fi
fi

# Signals wait until Python handles them; where env is too old, it ends on one in its first tenth of a second.
hold='env --block-signal=INT,TERM,HUP,USR1'
$hold true 2>/dev/null || hold=
if [ "$NGPU" -eq 1 ] && [ "$NNODES" -eq 1 ]; then
    # No launcher: starts faster, and signals reach the trainer itself. Port 0 lets the system choose a free one.
    export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=0
    exec $hold "$python" -m symbiotic_titan.train --job.config_file "$config" "$@"
fi

# In a process group of its own the launcher gets one Ctrl-C, passed on from here; it passes signals on to the ranks, which finish the
# step, save and end well.
set -m
$hold "$python" -P tools/launch.py --follow-parent --nnodes "$NNODES" --nproc_per_node "$NGPU" --rdzv_backend symbiotic \
    --rdzv_endpoint "${RDZV_ENDPOINT:-localhost:0}" --rdzv_id "${RDZV_ID:-symbiotic_titan}" \
    --rdzv_conf "join_timeout=$RDZV_TIMEOUT" --max_restarts "$MAX_RESTARTS" \
    --local-ranks-filter "$LOG_RANK" --role rank --tee 3 \
    -m symbiotic_titan.train --job.config_file "$config" "$@" &
launcher=$!
pass_on() {
    interrupted=1
    kill "-$1" "$launcher" 2>/dev/null || true
}
for name in INT TERM HUP USR1 USR2; do trap "pass_on $name" "$name"; done
interrupted=1
while [ -n "$interrupted" ]; do # a signal that is handled also ends wait
    interrupted= status=0
    wait "$launcher" || status=$?
done
exit "$status"
