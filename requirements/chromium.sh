#!/usr/bin/env bash
# Install Chromium, in which the tests drive report.html. usage: requirements/chromium.sh
#
# Needs root and Debian or a like system. Where that is missing it says so in one line and succeeds: those tests are
# then skipped, saying why.
set -uo pipefail

command -v chromium >/dev/null && exit 0

install() {
    [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || return 1
    apt-get install -y --no-install-recommends chromium \
        || { apt-get update && apt-get install -y --no-install-recommends chromium; }
}

install >/dev/null 2>&1 || echo "no chromium: the tests that drive report.html in a browser will be skipped;" \
    "install it by your package manager"
exit 0
