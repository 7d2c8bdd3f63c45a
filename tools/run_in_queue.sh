#!/usr/bin/env bash
# run_train.sh in a queue that starts a job again until it is done: the same statuses, but 85 where a signal has stopped the run before its
# last step, on this machine or another one. docs/examples/train.sbatch and docs/examples/kubernetes.yaml start it.
#
#   tools/run_in_queue.sh [--section.key value ...]     with the variables of run_train.sh
set -uo pipefail

STOPPED=85 # not a status of run_train.sh
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
seen=$(mktemp)
trap 'rm -f "$seen"' EXIT

# Shows the run's output and notes whether it was stopped. A queue may send its signal to every process of a job, which must not end this one.
follow() {
    trap '' INT TERM HUP USR1 USR2
    local line
    while IFS= read -r line || [ -n "$line" ]; do
        printf '%s\n' "$line"
        case $line in
            *'saving a checkpoint at step '*' and stopping'* | *'before any step was taken'* | *'stopped before the first step'*)
                printf 'stopped\n' >"$seen"
                ;;
        esac
    done
}

exec 3> >(follow)
follower=$!
"$root/run_train.sh" "$@" >&3 2>&1 3>&- &
run=$!
exec 3>&-
pass_on() {
    interrupted=1
    kill "-$1" "$run" 2>/dev/null || true
}
for name in TERM HUP USR1 USR2; do trap "pass_on $name" "$name"; done
interrupted=1 status=0
while [ -n "$interrupted" ]; do # a signal that is handled also ends wait
    interrupted= status=0
    wait "$run" || status=$?
done
wait "$follower" || true

if [ "$status" -eq 0 ] && [ -s "$seen" ]; then
    printf 'run_in_queue.sh: stopped before the last step; started again, the run goes on\n' >&2
    exit "$STOPPED"
fi
exit "$status"
