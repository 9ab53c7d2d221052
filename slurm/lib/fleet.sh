#!/usr/bin/env bash
# The engines of a run whose trainer is another job: started, made known by a file, watched. Called by job.sh.

{ # braces: bash reads all of this file before it begins
    set -uo pipefail
    # shellcheck source=slurm/lib/steps.sh
    . "$LIB/steps.sh"
    folder=$MEGATRON_R1_ATTEMPT/engines file=$JOBS/fleet
    mkdir -p "$folder/exits"
    echo "$SLURM_JOB_ID" >"$JOBS/fleet_job" # what the trainer cancels when it is done
    MEGATRON_R1_ENGINE_TOKEN=$(token)
    export MEGATRON_R1_ENGINE_TOKEN MEGATRON_R1_EXITS=$folder/exits MEGATRON_R1_ANNOUNCED=$folder

    asked=''
    trap 'asked=138' USR1
    trap 'asked=143' TERM
    kill_others=0 step 0 "$FLEET_NODES" 1 "$folder/node-%n.log" bash "$LIB/task.sh" "$TASK_PYTHON" \
        -m megatron_r1.cluster.engines "$MEGATRON_R1_ATTEMPT/run.toml" --gpus-per-node="$GPUS" --folder="$folder" &
    engines=$!

    known=''
    while [[ -z $asked ]] && kill -0 $engines 2>/dev/null; do
        if [[ -z $known ]] && (($(find "$folder" -name '[!.]*.engines' | wc -l) == FLEET_NODES)); then
            { echo "$SLURM_JOB_ID" && engines_overrides "$folder"; } >"$file.$SLURM_JOB_ID"
            mv "$file.$SLURM_JOB_ID" "$file"
            say "the engines can be asked; $file says where"
            known=yes
        elif [[ -z $known ]] && any_ended "$MEGATRON_R1_EXITS"; then
            say "the engines did not start; see $folder"
            asked=$(start_failure "$MEGATRON_R1_EXITS")
            continue
        elif [[ -n $known ]] && killed_for_good "$MEGATRON_R1_EXITS"; then
            say "the job begins anew"
            asked=137
            continue
        fi
        sleep 1 &
        wait $!
    done
    [[ $(head -n 1 "$file" 2>/dev/null) != "$SLURM_JOB_ID" ]] || rm -f "$file"
    if [[ -n $asked ]]; then
        [[ -z $known ]] || ((asked == 143)) || sleep 15 # for the trainer to see that the file is gone, and to save
        kill -USR1 $engines 2>/dev/null
    fi
    await $engines
    code=$?
    exit "${asked:-$((code > 0 ? code : 1))}"
}
