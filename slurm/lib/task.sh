#!/usr/bin/env bash
# What a step starts on each node: the command, with signals handed on and its exit code noted.
# usage: task.sh COMMAND [ARGUMENT ...]
#
# A run that has saved ends with 75 on all nodes, but not at the same moment; to srun that is a failure, for which it
# would kill the others in the middle of it. So the code goes into $MEGATRON_R1_EXITS, and srun sees success.
set -uo pipefail

{ # braces: bash reads all of this file before it begins
    for pair in ${MEGATRON_R1_ADDRESSES:-}; do
        [[ $pair == "$SLURMD_NODENAME="* ]] && export MEGATRON_R1_ADDRESS=${pair#*=}
    done
    ulimit -n "$(ulimit -Hn)" 2>/dev/null

    "$@" &
    child=$!
    trap 'kill -USR1 $child 2>/dev/null' USR1
    trap 'kill -TERM $child 2>/dev/null' TERM
    while :; do
        wait $child
        code=$?
        kill -0 $child 2>/dev/null || break # otherwise only a signal has come
    done
    echo "$code" >"$MEGATRON_R1_EXITS/$SLURMD_NODENAME"
    [[ $code == 75 ]] && exit 0
    exit "$code"
}
