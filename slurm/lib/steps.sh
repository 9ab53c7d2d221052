# shellcheck shell=bash
# What job.sh and launch.sh share: how a step is started, who is where, the fleet's token. Sourced.

say() { printf '[%(%F %T)T] %s\n' -1 "$*"; }

# Options that put a step into the container, where there is one.
container=()
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    container=(--container-image="$CONTAINER_IMAGE" --no-container-mount-home --container-workdir="$PWD")
    container+=(--container-mounts="${CONTAINER_MOUNTS:-$PWD:$PWD}")
fi

# step GROUP NODES TASKS_PER_NODE LOG COMMAND...: one step of the job on the first NODES of a part of it.
#
# GROUP is the part's number in a heterogeneous job, and not looked at in any other. %n in LOG is the node's number.
# Always in the background, where it becomes srun itself, so that $! is what signals can be sent to. With $limit it may
# take so many seconds, and $! is not srun.
step() {
    local group=$1 nodes=$2 per_node=$3 log=$4
    shift 4
    local cpus=${SLURM_JOB_CPUS_PER_NODE:-1} place=() bounded=()
    [[ -z ${limit:-} ]] || bounded=(timeout --kill-after=60 "$limit")
    if [[ -n ${SLURM_HET_SIZE:-} ]]; then
        cpus=SLURM_JOB_CPUS_PER_NODE_HET_GROUP_$group
        cpus=${!cpus:-1} place=(--het-group="$group")
    fi
    cpus=${cpus%%[(,]*}       # of "96(x4)"
    cpus=$((cpus / per_node)) # without it a task, and all that it starts, would share one core
    exec "${bounded[@]}" srun "${place[@]}" \
        --nodes="$nodes" --ntasks=$((nodes * per_node)) --ntasks-per-node="$per_node" \
        --cpus-per-task=$((cpus > 0 ? cpus : 1)) --overlap --kill-on-bad-exit="${kill_others:-1}" \
        --wait=0 --output="$log" --open-mode=append "${container[@]}" "$@"
}

# await PID: its exit code, whatever signals come meanwhile; one ends a `wait`, with a code of its own.
await() {
    while kill -0 "$1" 2>/dev/null; do wait "$1"; done
    wait "$1"
}

# node_list GROUP: names of the nodes of a part of the job, one a line.
node_list() {
    local nodes=SLURM_JOB_NODELIST_HET_GROUP_$1
    scontrol show hostnames "${!nodes:-$SLURM_JOB_NODELIST}"
}

# address NODE: where other nodes reach it.
address() {
    local found
    found=$(scontrol --oneliner show node "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    echo "${found:-$1}"
}

# Of the run, for engines and for who asks them: made by who comes first, in a file that nobody else can read.
token() {
    local file=$JOBS/token aside
    if [[ ! -s $file ]]; then
        aside=$(mktemp "$JOBS/.token.XXXXXX") # mode 600
        head -c 32 /dev/urandom | base64 | tr -d '=+/\n' >"$aside"
        ln "$aside" "$file" 2>/dev/null # does not replace one that another job has just made
        rm -f "$aside"
    fi
    cat "$file"
}

# engines_overrides FOLDER: what tells a run where its engines are, one option a line, from the nodes' announcements.
# A key in the plural takes a list.
engines_overrides() {
    sort -t$'\t' -k1,1 -k2,2n "$1"/*.engines | awk -F'\t' '
        { urls[$1] = urls[$1] separator[$1] "\"" $3 "\""; separator[$1] = ", " }
        END { for (key in urls) print "--" key "=" (key ~ /es$/ ? "[" urls[key] "]" : urls[key]) }'
}

# any_ended EXITS: has a node's task ended?
any_ended() {
    [[ -n $(find "$1" -type f -print -quit 2>/dev/null) ]]
}

# killed_for_good EXITS: has a node's task been ended by signals, so often that task.sh has given it up? Says which.
killed_for_good() {
    local file found=1
    for file in "$1"/*; do
        if [[ -f $file && $(<"$file") -gt 128 ]]; then
            say "node ${file##*/}: the process that keeps its engines was killed, again and again (exit code $(<"$file"))"
            found=0
        fi
    done
    return $found
}

# start_failure EXITS: the code of an attempt whose engines did not start, 2 where somebody has to mend the run file
start_failure() {
    sleep 1 # for the others that fail alike to say so
    if grep -qsx 2 "$1"/*; then echo 2; else echo 1; fi
}
