#!/usr/bin/env bash
# Install lock files into a virtual environment: requirements/install.sh VENV LOCK...
#
# uv unpacks in parallel and leaves bytecode to the first import: 19 s for cpu.lock on two cores, pip 125 s.
# uv does not read pip's settings, so the package folders and index that pip knows are handed on to it.
# The first try uses the machine's own sources, the second adds the public index of CPU builds of torch,
# the last is plain pip, which knows every setting of the machine.
set -euo pipefail

UV_VERSION=0.13.9
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

venv=$1
shift
locks=()
for lock in "$@"; do locks+=(--requirement "$lock"); done
python=$venv/bin/python

# setting NAME: the words that pip's configuration files and environment give NAME, once each.
setting() {
    "$python" -m pip config list | sed -n "s/^[^=]*\.$1='\(.*\)'\$/\1/p" | sed 's/\\n/ /g' | tr -s ' ' '\n' | sort -u
}

with_uv() {
    "$python" -m uv pip install --quiet --python "$python" --no-deps "${locks[@]}" "$@"
}

with_pip() {
    "$python" -m pip install --quiet --quiet --no-deps "${locks[@]}" "$@"
}

if "$python" -m pip install --quiet --quiet "uv==$UV_VERSION"; then
    sources=()
    for folder in $(setting find-links); do sources+=(--find-links "$folder"); done
    for index in $(setting index-url | tail -n 1); do sources+=(--default-index "$index"); done
    with_uv "${sources[@]}" && exit
    with_uv "${sources[@]}" --extra-index-url "$TORCH_INDEX" --index-strategy unsafe-best-match && exit
fi
with_pip || with_pip --extra-index-url "$TORCH_INDEX"
