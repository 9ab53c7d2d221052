#!/usr/bin/env bash
# End what earlier attempts and jobs that are over have left on this node. usage: strays.sh RUNNING_JOB...
#
# Only processes of ours that carry the name of an attempt are looked at; those of jobs that still run are left alone.
set -uo pipefail

strays() {
    local folder attempt node cluster job
    for folder in /proc/[0-9]*; do
        [[ -O $folder ]] || continue
        attempt='' node='' cluster=''
        while IFS= read -r -d '' line; do
            case $line in
                MEGATRON_R1_ATTEMPT=*) attempt=${line#*=} ;;
                SLURMD_NODENAME=*) node=${line#*=} ;;
                SLURM_CLUSTER_NAME=*) cluster=${line#*=} ;;
            esac
        done 2>/dev/null <"$folder/environ"
        [[ -n $attempt && $attempt != "$MEGATRON_R1_ATTEMPT" ]] || continue
        [[ $node == "$SLURMD_NODENAME" && $cluster == "$SLURM_CLUSTER_NAME" ]] || continue
        job=${attempt%-*} job=${job##*-}
        if [[ $job == "$this" || $running != *" $job "* ]]; then echo "${folder#/proc/}"; fi
    done
}

this=${MEGATRON_R1_ATTEMPT%-*} this=${this##*-}
running=" $* "
mapfile -t found < <(strays)
((${#found[@]})) || exit 0
echo "$SLURMD_NODENAME: ending processes that an earlier attempt has left: ${#found[@]}"
kill -TERM "${found[@]}" 2>/dev/null
sleep 5
mapfile -t found < <(strays)
((${#found[@]})) && kill -KILL "${found[@]}" 2>/dev/null
exit 0
