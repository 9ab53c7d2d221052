# shellcheck shell=bash
# The life of one job, sourced by every .sbatch file: what its run file needs, strays, health, the run, its end.
# LIB is this folder.
#
# What a run needs is in its run file. What only the site knows comes from sbatch (--partition, --account, --time, ...)
# or from the environment that the job is submitted with:
#
#   MEGATRON_R1_PYTHON   Python with megatron_r1 on the hosts, on a file system that all nodes see (python3)
#   CONTAINER_IMAGE      an image for pyxis/enroot that the steps run in; empty = on the hosts
#   CONTAINER_MOUNTS     what it sees of the hosts ($PWD:$PWD): this folder, run files, models, data, outputs
#   CONTAINER_PYTHON     Python with megatron_r1 in the image (python3)
#   MASTER_PORT          where the first node listens for the others (20000 + the job's number modulo 10000)
#   HEALTH_CHECK         0 = begin without looking at the nodes
#   HEALTH_COMMAND       a check of your own, run on each node; if it fails, the node is bad, and its last line says why
#   MAX_FAILURES         failures in a row, without a newer checkpoint between, after which the job ends (3)

set -uo pipefail
PYTHON=${MEGATRON_R1_PYTHON:-python3}
TASK_PYTHON=$PYTHON
[[ -z ${CONTAINER_IMAGE:-} ]] || TASK_PYTHON=${CONTAINER_PYTHON:-python3}
GPUS=${SLURM_GPUS_ON_NODE:-0}
RESTART=${SLURM_RESTART_COUNT:-0}
NODES=1 FLEET_NODES=0 TRAINS=0 OUTPUT='' RESOLVED='' FLEET=${FLEET:-none}
export LIB PYTHON TASK_PYTHON GPUS NODES FLEET_NODES TRAINS FLEET
# shellcheck source=slurm/lib/steps.sh
. "$LIB/steps.sh"
# shellcheck source=slurm/lib/nodes.sh
. "$LIB/nodes.sh"

asked='' child=''
hand_on() {
    asked=$1
    say "asked to end by SIG$1"
    [[ -z $child ]] || kill "-$1" "$child" 2>/dev/null
}
trap 'hand_on USR1' USR1
trap 'hand_on TERM' TERM

# job VERB RUN.toml [--section.key=value ...], or a verb on checkpoints with its paths
job() {
    if [[ $* == *.toml* ]]; then
        RESOLVED=$("$PYTHON" -m megatron_r1.cli "$@" --dry-run) || exit 2
    fi
    prepare
    JOBS=${OUTPUT:+$OUTPUT/logs/slurm} PAGE=$OUTPUT/report.html
    JOBS=${JOBS:-$PWD/slurm-$SLURM_JOB_ID}
    attempt bash "$LIB/launch.sh" "$@"
}

# stage RECIPE.toml STAGE [--stages.STAGE.key=value ...]: one stage of a recipe; `megatron-r1 run` keeps the books
stage() {
    local recipe=$1 name=$2
    shift 2
    RESOLVED=$("$PYTHON" -m megatron_r1.cli run "$recipe" --stage="$name" "$@") || exit 2
    prepare
    JOBS=$(dirname "$OUTPUT")/logs/slurm PAGE=$(dirname "$OUTPUT")/report.html
    printf -v MEGATRON_R1_STAGE_COMMAND 'bash %q' "$LIB/launch.sh"
    export MEGATRON_R1_STAGE_COMMAND
    attempt "$PYTHON" -m megatron_r1.cli run "$recipe" --only="$name" "$@"
}

# fleet VERB RUN.toml: the engines of a run whose trainer is another job
fleet() {
    RESOLVED=$("$PYTHON" -m megatron_r1.cli "$@" --dry-run) || exit 2
    prepare
    JOBS=$OUTPUT/logs/slurm PAGE=
    attempt bash "$LIB/fleet.sh"
}

# What the resolved run file asks for, and whether the job has it.
prepare() {
    local settings nodes=${SLURM_JOB_NUM_NODES_HET_GROUP_0:-$SLURM_JOB_NUM_NODES} wanted
    if [[ -n $RESOLVED ]]; then
        settings=$("$PYTHON" -m megatron_r1.cluster.needs --gpus-per-node="$GPUS" <<<"$RESOLVED") || exit 2
        eval "$settings"
        [[ -z $OUTPUT || $OUTPUT == /* ]] || OUTPUT=$PWD/$OUTPUT
    fi
    wanted=$NODES
    if [[ $FLEET == only ]]; then
        wanted=$FLEET_NODES
    elif [[ -n ${SLURM_HET_SIZE:-} ]]; then
        FLEET=steps
        if ((SLURM_JOB_NUM_NODES_HET_GROUP_1 != FLEET_NODES)); then
            refuse "$FLEET_NODES nodes for engines, the second part of this job has $SLURM_JOB_NUM_NODES_HET_GROUP_1"
        fi
    elif ((TRAINS == 0 && nodes > 1)); then
        FLEET=steps wanted=$FLEET_NODES
    fi
    ((nodes == wanted)) || refuse "--nodes=$wanted, this job has $nodes"
    if [[ $FLEET != none && -n $RESOLVED ]]; then
        "$PYTHON" -m megatron_r1.cluster.needs --gpus-per-node="$GPUS" --elsewhere <<<"$RESOLVED" >/dev/null || exit 2
    fi
}

refuse() {
    say "the run file asks for $1; slurm/submit.py works it out"
    exit 2
}

# attempt COMMAND...: everything from the first look at the nodes to what the end means
attempt() {
    export JOBS MEGATRON_R1_ATTEMPT=$JOBS/${SLURM_JOB_NAME%.sbatch}-$SLURM_JOB_ID-$RESTART
    local code name names
    mkdir -p "$MEGATRON_R1_ATTEMPT"
    printf '%s\n' "$RESOLVED" >"$MEGATRON_R1_ATTEMPT/run.toml"
    say "attempt $((RESTART + 1)) on $(all_nodes | paste -sd ,); logs: $MEGATRON_R1_ATTEMPT"
    mapfile -t names < <(all_nodes)
    export MEGATRON_R1_ADDRESSES=''
    for name in "${names[@]}"; do MEGATRON_R1_ADDRESSES+="$name=$(address "$name") "; done
    MASTER=${MEGATRON_R1_ADDRESSES%% *}
    export MASTER=${MASTER#*=}:${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
    end_strays
    [[ ${HEALTH_CHECK:-1} == 0 ]] || check_health
    "$@" &
    child=$!
    [[ -z $asked ]] || kill "-$asked" "$child"
    await "$child"
    code=$?
    child=''
    ended "$code"
}

# How far the run is: its newest checkpoint, or, of a verb that trains nothing, the bytes that it has written.
progress() {
    if ((TRAINS)); then
        find "$OUTPUT/checkpoints" -maxdepth 1 -regex '.*/step_[0-9]+' -printf '%f\n' 2>/dev/null | sort | tail -n 1
    elif [[ -d $OUTPUT ]]; then
        find "$OUTPUT" -type f -not -path "$OUTPUT/logs/*" -printf '%s\n' | awk '{ sum += $1 } END { print sum + 0 }'
    fi
}

# ended CODE: requeue, or end for good
ended() {
    local code=$1 at count node
    at=$(progress)
    at=${at:-nothing}
    if [[ $asked == USR1 && ($code == 138 || $code == 143) ]]; then code=75; fi # it had nothing to save yet
    say "exit code $code; done so far: $at"
    if ! printf '%s\t%s\t%s\t%s\t%(%FT%T)T\n' "$SLURM_JOB_ID" "$RESTART" "$code" "$at" -1 >>"$JOBS/attempts"; then
        say "the job ends: what cannot be written down cannot be counted"
        finish "$code"
    fi
    ((code != 69)) || hung
    for node in "${!bad[@]}"; do
        say "bad node $node: ${bad[$node]}"
        printf '%s\t%s\t%s\n' "$node" "$SLURM_JOB_ID" "${bad[$node]}" >>"$JOBS/bad_nodes"
    done
    case $code in
        0 | 2 | 74) finish "$code" ;; # done; a mistake in the run file; a full disk
    esac
    # scancel means it, and who requeues from outside does so without our help
    [[ $asked != TERM ]] || finish "$code"
    count=$(tac "$JOBS/attempts" | awk -F'\t' -v job="$SLURM_JOB_ID" -v at="$at" \
        '$1 != job { next } $4 != at { exit } { count++ } END { print count + 0 }')
    if ((count < ${MAX_FAILURES:-3})); then
        requeue
    else
        say "$count attempts have come no further: the job ends"
    fi
    finish "$code"
}

# Nodes whose ranks did not answer when a run hung.
hung() {
    local host name
    while read -r host; do
        for name in "$host" "${host%%.*}"; do # Slurm's name may lack the domain
            if grep -qxF "$name" <<<"$(all_nodes)"; then bad["$name"]='did not answer (heartbeats/hang.txt)'; fi
        done
    done < <(sed -n 's/^ *not answering: rank [0-9]* (host \([^,]*\),.*/\1/p' "$OUTPUT/heartbeats/hang.txt" 2>/dev/null)
}

finish() {
    if [[ $FLEET == job && $asked != TERM && -s $JOBS/fleet_job ]]; then scancel "$(cat "$JOBS/fleet_job")"; fi
    [[ ! -s $PAGE ]] || say "report: $PAGE"
    say "logs: $MEGATRON_R1_ATTEMPT; attempts: $JOBS/attempts"
    exit "$1"
}
