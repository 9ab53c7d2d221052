#!/usr/bin/env bash
# Install lock files into a virtual environment: requirements/install.sh VENV LOCK...
# With TARGET=FOLDER into a folder of their own, for that environment's Python.
#
# uv unpacks in parallel and leaves bytecode to the first import: 19 s for cpu.lock on two cores, pip 125 s.
# uv does not read pip's settings, so the package folders and index that pip knows are handed on to it.
# TORCH_INDEX, where it is set, is the address of PyTorch's index of CPU builds, for a pip that does not know it.
# Where uv cannot be had or fails, plain pip, which knows every setting of the machine, is tried.
set -euo pipefail

UV_VERSION=0.13.9

venv=$1
shift
locks=()
for lock in "$@"; do locks+=(--requirement "$lock"); done
python=$venv/bin/python
target=(${TARGET:+--target "$TARGET"})

# setting NAME: the words that pip's configuration files and environment give NAME, once each.
setting() {
    "$python" -m pip config list | sed -n "s/^[^=]*\.$1='\(.*\)'\$/\1/p" | sed 's/\\n/ /g' | tr -s ' ' '\n' | sort -u
}

with_uv() {
    "$python" -m uv pip install --quiet --python "$python" --no-deps "${target[@]}" "${locks[@]}" "$@"
}

with_pip() {
    "$python" -m pip install --quiet --quiet --no-deps "${target[@]}" "${locks[@]}" "$@"
}

if "$python" -m pip install --quiet --quiet "uv==$UV_VERSION"; then
    sources=()
    for folder in $(setting find-links); do sources+=(--find-links "$folder"); done
    for index in $(setting index-url | tail -n 1); do sources+=(--default-index "$index"); done
    [ -z "${TORCH_INDEX:-}" ] || sources+=(--extra-index-url "$TORCH_INDEX" --index-strategy unsafe-best-match)
    with_uv "${sources[@]}" && exit
fi
with_pip ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} && exit
cat >&2 <<'MESSAGE'
The install failed. If it did not find torch==2.13.0+cpu: CPU builds of torch are in an index of PyTorch's own.
Look up its address on the PyTorch site (Get Started, Linux, Pip, CPU) and repeat with make TORCH_INDEX=<address>
MESSAGE
exit 1
