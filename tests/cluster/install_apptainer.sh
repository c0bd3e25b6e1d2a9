#!/usr/bin/env bash
# Unpacks Apptainer of Debian unstable into a directory of its own, with the C library that it was built for.
# Debian 12 has no Apptainer, and unstable keeps one version only: this takes the one that is there.
# Doing it twice does nothing. Without it the tests that need Apptainer are skipped, and say so.
set -euo pipefail

target=${1:-/opt/hpcserve-testbed/apptainer}
if [ -x "$target/usr/bin/apptainer" ]; then
    exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/archives/partial" "$work/debs" "$work/tree"
keys=/usr/share/keyrings/debian-archive-keyring.gpg
# The mirror that this machine takes Debian from.
mirror_of_apt() {
    # shellcheck disable=SC2016  # apt fills them in
    apt-get indextargets --format '$(SITE) $(ORIGIN) $(CODENAME)' |
        awk '$2 == "Debian" && $3 == "bookworm" { print $1; exit }'
}
mirror=$(mirror_of_apt)
if [ -z "$mirror" ]; then
    apt-get update --quiet=2
    mirror=$(mirror_of_apt)
fi
echo "deb [signed-by=$keys] $mirror unstable main" >"$work/sources.list"
apt=(apt-get --quiet=2 -o "Dir::State::lists=$work/lists" -o Dir::State::status=/dev/null
    -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::Cache=$work"
    -o APT::Sandbox::User=root)
"${apt[@]}" update
(cd "$work/debs" && "${apt[@]}" download apptainer libc6 libseccomp2 libsqlite3-0)
for package in "$work"/debs/*.deb; do
    dpkg --extract "$package" "$work/tree"
done

libraries=usr/lib/x86_64-linux-gnu
for program in usr/bin/apptainer "$libraries/apptainer/bin/starter"; do
    # An old-style RPATH: it also holds for the libraries of the libraries.
    patchelf --force-rpath --set-rpath "$target/$libraries" "$work/tree/$program"
    patchelf --set-interpreter "$target/$libraries/ld-linux-x86-64.so.2" "$work/tree/$program"
done
# Moved from its place, it looks for its configuration relative to either program.
ln -s ../etc "$work/tree/usr/etc"
ln -s ../var "$work/tree/usr/var"
ln -s ../../etc "$work/tree/usr/lib/etc"
ln -s ../../var "$work/tree/usr/lib/var"

mkdir -p "$(dirname "$target")"
chmod 755 "$work/tree"
rm -rf "$target" "$target.part"
cp -a "$work/tree" "$target.part"
mv "$target.part" "$target"
"$target/usr/bin/apptainer" --version
