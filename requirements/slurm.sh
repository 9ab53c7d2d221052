#!/usr/bin/env bash
# Install Slurm and munge, which the tests run on this machine, and shellcheck. usage: requirements/slurm.sh
#
# Needs root and Debian or a like system; no service is started. Where that is missing it says so in one line and
# succeeds: those tests are then skipped, saying why.
set -uo pipefail

packages=(slurmctld slurmd slurm-client munge shellcheck)
present() {
    command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged && command -v shellcheck
}
present >/dev/null && exit 0

install() {
    [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || return 1
    export DEBIAN_FRONTEND=noninteractive
    if [[ ! -e /usr/sbin/policy-rc.d ]]; then # Debian starts what it installs unless this forbids it
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    apt-get install -y --no-install-recommends "${packages[@]}" \
        || { apt-get update && apt-get install -y --no-install-recommends "${packages[@]}"; }
}

install >/dev/null 2>&1 || echo "no Slurm: the tests that run jobs on it will be skipped;" \
    "install ${packages[*]} by your package manager"
exit 0
