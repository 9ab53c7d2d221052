# shellcheck shell=bash
# The nodes of a job: what is left on them, whether they are well, and how a job gets others. Sourced by job.sh.

declare -A bad=() # node -> what is wrong with it

all_nodes() {
    local group
    for ((group = 0; group < ${SLURM_HET_SIZE:-1}; group++)); do node_list "$group"; done
}

# everywhere TASKS_PER_NODE LOG COMMAND...: on all nodes, part by part, at the same time, for two minutes at most
everywhere() {
    local group steps=() per_node=$1 log=$2
    shift 2
    for ((group = 0; group < ${SLURM_HET_SIZE:-1}; group++)); do
        limit=120 kill_others=0 step "$group" "$(node_list $group | wc -l)" "$per_node" "$log" "$@" &
        steps+=($!)
    done
    wait "${steps[@]}"
}

end_strays() {
    local said live=()
    # Without an answer every job would pass for one that is over.
    said=$(squeue --noheader --user="$(id -u)" --format=%A --states=running,suspended 2>/dev/null) || return 0
    mapfile -t live <<<"$said"
    # shellcheck disable=SC2034  # `step` reads it
    (container=() && everywhere 1 "$MEGATRON_R1_ATTEMPT/strays.log" bash "$LIB/strays.sh" "${live[@]}")
    [[ ! -s $MEGATRON_R1_ATTEMPT/strays.log ]] || cat "$MEGATRON_R1_ATTEMPT/strays.log"
}

# Looks at every node, and requeues the job on others if one is bad.
check_health() {
    local folder=$MEGATRON_R1_ATTEMPT/health node group first started=$SECONDS per_node=$((GPUS > 0 ? GPUS : 1)) nodes
    mkdir -p "$folder"
    for ((group = 0; group < ${SLURM_HET_SIZE:-1}; group++)); do
        first=$(address "$(node_list $group | head -n 1)")
        # What waits for a driver or a file system that hangs never ends by itself.
        limit=900 kill_others=0 step "$group" "$(node_list $group | wc -l)" "$per_node" "$folder/all.log" \
            "$TASK_PYTHON" -m megatron_r1.cluster.health --folder="$folder" --gpus="$GPUS" --path="$JOBS" \
            --store="$first:$((${MASTER##*:} + 1 + group))" --nodes="$(node_list $group | paste -sd ,)" &
    done
    wait
    [[ -z $asked ]] || ended 143
    while read -r node; do
        if [[ ! -s $folder/$node ]]; then
            bad[$node]="gave no answer; see $folder/all.log"
        elif [[ $(head -n 1 "$folder/$node") != well ]]; then
            bad[$node]=$(grep '^bad: ' "$folder/$node" | sed 's/^bad: //' | paste -sd ';')
        fi
    done < <(all_nodes)
    nodes=$(all_nodes | wc -l)
    say "$nodes nodes looked at in $((SECONDS - started)) s, bad: ${#bad[@]}"
    ((${#bad[@]})) || return 0
    if ((${#bad[@]} == nodes)) && ! grep -qvF "$JOBS has " <<<"$(printf '%s\n' "${bad[@]}")"; then
        say "the disk that all nodes share is full: ${bad[*]}"
        bad=()
        ended 74
    fi
    ended 1
}

# Puts the job back into its queue, without nodes that are known to be bad. Slurm then ends this script.
requeue() {
    local group had id out
    trap '' TERM USR1
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "the job cannot be requeued; submit it again"
        return
    fi
    say "requeued"
    ((${#bad[@]})) || exit 75
    out=$(IFS=, && echo "${!bad[*]}")
    for ((group = 0; group < ${SLURM_HET_SIZE:-1}; group++)); do
        id=SLURM_JOB_ID_HET_GROUP_$group
        id=${!id:-$SLURM_JOB_ID}
        had=$(scontrol --oneliner show job "$id" | head -n 1 | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
        [[ $had == '(null)' ]] && had=''
        # Slurm refuses as long as it takes the job for running.
        for _ in {1..40}; do
            scontrol update JobId="$id" ExcNodeList="${had:+$had,}$out" 2>/dev/null && continue 2
            sleep 0.5
        done
        say "job $id may get them again: Slurm has not taken ExcNodeList=$out"
    done
    exit 75
}
