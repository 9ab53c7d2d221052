#!/usr/bin/env bash
# What a step starts on each node: the command, with signals handed on and its exit code noted.
# usage: task.sh COMMAND [ARGUMENT ...]
#
# With MEGATRON_R1_ANNOUNCED the command keeps the engines of this node, and says in that folder when they can be asked.
# If it is killed after that, by whatever, it is replaced: the engines have gone with it, and another begins them anew.
#
# A run that has saved ends with 75 on all nodes, but not at the same moment; to srun that is a failure, for which it
# would kill the others in the middle of it. So the code goes into $MEGATRON_R1_EXITS, and srun sees success.
# shellcheck disable=SC2317  # traps call functions
set -uo pipefail

asked='' child=''
hand_on() {
    asked=$1
    [[ -z $child ]] || kill "-$1" "$child" 2>/dev/null
}
trap 'hand_on USR1' USR1
trap 'hand_on TERM' TERM

# Does the command's end call for another? At most three times, unless one has lived for ten minutes meanwhile.
killed=0
calls_for_another() {
    ((code > 128)) && [[ -z $asked && -e ${MEGATRON_R1_ANNOUNCED:-}/$SLURM_NODEID.engines ]] || return
    ((SECONDS - started < 600)) || killed=0
    ((++killed <= 3))
}

{ # braces: bash reads all of this file before it begins
    for pair in ${MEGATRON_R1_ADDRESSES:-}; do
        [[ $pair == "$SLURMD_NODENAME="* ]] && export MEGATRON_R1_ADDRESS=${pair#*=}
    done
    ulimit -n "$(ulimit -Hn)" 2>/dev/null

    while :; do
        started=$SECONDS
        "$@" &
        child=$!
        [[ -z $asked ]] || kill "-$asked" "$child"
        while kill -0 "$child" 2>/dev/null; do wait "$child"; done # a signal ends a wait, too, with a code of its own
        wait "$child"
        code=$?
        calls_for_another || break
        printf '[%(%F %T)T] ended by signal %d, and started anew: %s\n' -1 $((code - 128)) "$*"
    done
    echo "$code" >"$MEGATRON_R1_EXITS/$SLURMD_NODENAME"
    [[ $code == 75 ]] && exit 0
    exit "$code"
}
