#!/usr/bin/env bash
# Installs what the cluster tests need: Slurm, munge, Open MPI, PMIx, network namespaces, Apptainer. Debian 12,
# as root.
# Doing it twice does nothing. The packages' own services stay off: the tests start their own daemons.
set -euo pipefail

packages=(slurmctld slurmd slurm-client munge openmpi-bin libopenmpi-dev libpmix2 iproute2 util-linux
    procps shellcheck python3-venv python3-dev g++ make gcc libslurm-dev patchelf squashfs-tools squashfuse)

if [ "$(id -u)" != 0 ] || [ ! -f /etc/debian_version ]; then
    echo "install.sh: needs root on Debian" >&2
    exit 1
fi

missing=()
for package in "${packages[@]}"; do
    state=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} != 0 ]; then
    echo "installing: ${missing[*]}"
    # A policy of 101 tells Debian's package scripts to start no daemon; an existing policy is left alone.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        trap 'rm -f "$policy"' EXIT
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update --quiet=2
    apt-get install --quiet=2 --yes --no-install-recommends "${missing[@]}" >/dev/null
fi

bash "$(dirname "$0")/install_apptainer.sh" ||
    echo "warning: Debian unstable has no Apptainer that works here; its tests are skipped" >&2
