#!/usr/bin/env bash
# The steps of one verb: engines on nodes of their own, where there are such, and the verb itself.
# usage: launch.sh VERB RUN.toml [--section.key=value ...]
#
# job.sh calls it, or `megatron-r1 run` for a stage of a recipe; both hand on USR1 and TERM. Its code is the verb's.
# shellcheck disable=SC2153,SC2317  # NODES, FLEET and others come from job.sh; traps call functions
set -uo pipefail
# shellcheck source=slurm/lib/steps.sh
. "$LIB/steps.sh"

asked='' learner='' fleet=''
# A TERM is not for srun, which would kill its step at once; Slurm itself has sent one to every task.
ask() {
    asked=$1
    [[ -n $learner ]] && kill -USR1 "$learner" 2>/dev/null
}
trap 'ask USR1' USR1
trap 'ask TERM' TERM
trap 'end_engines' EXIT

# A pause that signals end.
pause() {
    sleep "$1" &
    wait $! || kill $! 2>/dev/null
}

# task NODES GROUP LOG EXITS COMMAND...: the command once on each node; EXITS is where its exit codes go.
task() {
    local nodes=$1 group=$2 log=$3
    export MEGATRON_R1_EXITS=$4
    shift 4
    rm -rf "$MEGATRON_R1_EXITS" && mkdir -p "$MEGATRON_R1_EXITS"
    step "$group" "$nodes" 1 "$log" bash "$LIB/task.sh" "$TASK_PYTHON" -m "$@"
}

start_engines() {
    folder=$MEGATRON_R1_ATTEMPT/engines
    rm -rf "$folder" && mkdir -p "$folder"
    export MEGATRON_R1_ENGINE_TOKEN
    MEGATRON_R1_ENGINE_TOKEN=$(token)
    say "starting engines on $FLEET_NODES nodes; their logs: $folder"
    MEGATRON_R1_ANNOUNCED=$folder kill_others=0 task "$FLEET_NODES" 1 "$folder/node-%n.log" "$folder/exits" \
        megatron_r1.cluster.engines "$MEGATRON_R1_ATTEMPT/run.toml" --gpus-per-node="$GPUS" --folder="$folder" &
    fleet=$!
    until (($(find "$folder" -name '[!.]*.engines' | wc -l) == FLEET_NODES)); do
        [[ -z $asked ]] || return 138 # nothing has begun yet
        # One node that has failed ends its task; the step waits for the others, whose engines may wait for it.
        if ! kill -0 "$fleet" 2>/dev/null || any_ended "$folder/exits"; then
            say "the engines did not start; see $folder"
            return "$(start_failure "$folder/exits")"
        fi
        pause 1
    done
}

# While the verb runs: when a node can keep no engines any more, the run saves, and the job goes on elsewhere.
watch_engines() {
    # It reads for 5 s what nobody writes: a `sleep` would outlive this when the end of the verb kills it.
    until read -rt 5 <> <(:); do
        if killed_for_good "$folder/exits"; then
            say "the run saves, and the job begins anew"
            kill -USR1 "$learner"
            return
        fi
    done
}

end_engines() {
    [[ -n $fleet ]] && kill -USR1 "$fleet" 2>/dev/null && await "$fleet"
    fleet=''
}

# The verb on its nodes.
begin_verb() {
    export MEGATRON_R1_NODES=$NODES MEGATRON_R1_RENDEZVOUS=$MASTER
    exits=$MEGATRON_R1_ATTEMPT/exits
    task "$NODES" 0 "$MEGATRON_R1_ATTEMPT/$verb-%n.log" "$exits" megatron_r1.cli "$@" &
    learner=$!
    [[ -z $asked ]] || kill -USR1 "$learner"
}

# Its end. Its code is what its tasks have noted, whatever srun's: where one fails, srun kills the others.
end_verb() {
    local code worst
    await "$learner"
    code=$?
    learner=''
    worst=$(cat "$exits"/* 2>/dev/null | awk '$1 > 0 && $1 < 128 && $1 != 75' | sort -n | head -n 1)
    # Not in pipes: grep -q ends at what it looks for, and pipefail takes what then happens to cat for the answer.
    if grep -qsx 74 "$exits"/*; then return 74; fi # other nodes only say that one has gone
    if ((code == 0)) && grep -qsx 75 "$exits"/*; then return 75; fi
    return "${worst:-$code}"
}

# What the fleet's job has written, once that job runs: its number, then options, one a line.
read_fleet() {
    local state
    mapfile -t said 2>/dev/null <"$JOBS/fleet" || return 1
    ((${#said[@]} > 1)) || return 1
    if state=$(squeue --noheader --format=%T --jobs="${said[0]}" 2>&1); then
        [[ $state == RUNNING ]]
    else
        [[ $state != *'Invalid job id'* ]] # Slurm does not answer, which says nothing of the engines
    fi
}

wait_for_fleet() {
    local told=''
    until read_fleet; do
        [[ -z $asked ]] || return 138 # nothing has begun yet
        [[ -n $told ]] || say "waiting for the fleet's job to write $JOBS/fleet"
        told=yes
        pause 5
    done
    MEGATRON_R1_ENGINE_TOKEN=$(token)
    export MEGATRON_R1_ENGINE_TOKEN
    say "engines of job ${said[0]}: ${said[*]:1}"
}

# The verb with the engines of another job. When these move to other nodes, or end, the verb saves and goes on with the
# new ones, in the same job.
run_with_fleet_job() {
    local code before moved
    while :; do
        wait_for_fleet || return
        before="${said[*]}" moved=''
        begin_verb "$@" "${said[@]:1}"
        while kill -0 "$learner" 2>/dev/null; do
            pause 5
            if [[ -z $moved ]] && ! { read_fleet && [[ "${said[*]}" == "$before" ]]; }; then
                say "the engines have moved or ended: the run saves"
                moved=yes
                kill -USR1 "$learner" 2>/dev/null
            fi
        done
        end_verb
        code=$?
        [[ -n $moved && -z $asked && $code != 0 && $code != 2 ]] || return $code
    done
}

# In braces, so that bash has read all of this file before it begins: it may change while a run of weeks lasts.
{
    verb=$1
    case $FLEET in
        none) begin_verb "$@" ;;
        job)
            run_with_fleet_job "$@"
            exit
            ;;
        steps)
            start_engines || exit
            mapfile -t options < <(engines_overrides "$folder")
            begin_verb "$@" "${options[@]}"
            watch_engines &
            watch=$!
            ;;
    esac
    end_verb
    code=$?
    [[ -z ${watch:-} ]] || kill "$watch" 2>/dev/null
    exit $code
}
