#!/usr/bin/env bash
# Build Dockerfile.cpu without a container engine or an image registry, and run what it says in the result.
# usage, as root on Debian: tools/build_cpu_image.sh FOLDER [option of `buildah build` ...]
#
# debootstrap makes the system that the Dockerfile's FROM names, buildah follows the Dockerfile in chroots, and then runs
# the health check and the default command in the image as its user. All of it lies in FOLDER (12 GB).
# Where pip has settings of its own, hand them on: --volume=/etc/pip.conf:/etc/pip.conf:ro
set -euo pipefail

folder=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.."

for tool in debootstrap buildah; do
    command -v "$tool" >/dev/null || { echo "$tool is missing: apt-get install $tool" >&2; exit 1; }
done

base=$(sed -n 's/^FROM \(debian:[^ ]*\).*/\1/p' Dockerfile.cpu)
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
store=(buildah --root "$folder/store" --runroot "$folder/run")

if ! "${store[@]}" inspect --type image "docker.io/library/$base" >/dev/null 2>&1; then
    [ -e "$folder/root/etc/debian_version" ] || debootstrap --variant=minbase bookworm "$folder/root"
    empty=$("${store[@]}" from scratch)
    "${store[@]}" add --quiet "$empty" "$folder/root" / >/dev/null
    "${store[@]}" commit --quiet --rm "$empty" "docker.io/library/$base"
fi

SECONDS=0
"${store[@]}" build --format=docker --pull-never --network=host --file=Dockerfile.cpu --tag=megatron-r1:cpu "$@" .
echo "built in $SECONDS s"

container=$("${store[@]}" from --pull-never megatron-r1:cpu)
trap '"${store[@]}" rm "$container" >/dev/null' EXIT
# A container engine writes its containers' names into /etc/hosts, buildah does not.
run=("${store[@]}" run --hostname=localhost "$container" --)
[ "$("${run[@]}" id -u)" != 0 ] || { echo "the image runs as root" >&2; exit 1; }
"${run[@]}" megatron-r1 doctor --quick
"${run[@]}" python tools/quickstart.py
