#!/usr/bin/env bash
# Put bubblewrap, which the sandbox of code rewards runs programs in, into a virtual environment.
# usage: requirements/bubblewrap.sh VENV
#
# Needs no root and touches nothing outside VENV: the distribution's package is unpacked, not installed.
# Where that is impossible it says so in one line and succeeds, since only code rewards need it.
set -uo pipefail

venv=$1

if command -v bwrap >/dev/null || [[ -x $venv/bin/bwrap ]]; then
    exit 0
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

download() {
    (cd "$folder" && apt-get download bubblewrap) >/dev/null 2>&1
}

unpack() {
    command -v apt-get >/dev/null && command -v dpkg >/dev/null || return 1
    download || { [[ $(id -u) == 0 ]] && apt-get update >/dev/null 2>&1 && download; } || return 1
    dpkg -x "$folder"/bubblewrap_*.deb "$folder" && "$folder/usr/bin/bwrap" --version >/dev/null || return 1
    # Beside, then renamed: an interrupted copy must not be taken for the program.
    cp "$folder/usr/bin/bwrap" "$venv/bin/.bwrap" && mv "$venv/bin/.bwrap" "$venv/bin/bwrap"
}

unpack 2>/dev/null || echo "no bubblewrap: rewards that run code will not start with sandbox = \"bubblewrap\";" \
    "install it (apt-get install bubblewrap, dnf install bubblewrap) or put bwrap into $venv/bin"
exit 0
