#!/bin/bash
# Installs what the tests need on Debian 12, as root, and may be run again at any time: what is there is left alone.
#   tests/setup.sh            everything
#   tests/setup.sh build      only what building needs
#   tests/setup.sh --check [all|build]    installs nothing; fails when something is missing
set -euo pipefail
cd "$(dirname "$0")/.."

building=(ca-certificates curl git gcc g++ make pkg-config libseccomp-dev iproute2)
testing=(
    procps psmisc lsof strace util-linux coreutils findutils diffutils gawk sed tar xz-utils bzip2 gzip p7zip-full
    bash perl python3 openssl sqlite3 redis-server redis-tools nodejs golang-go default-jdk-headless tmux less vim-tiny
    libgomp1 dpkg-dev qemu-system-x86 busybox-static cpio kmod binutils
)

missing() {
    for package in "$@"; do
        # A program that came some other way (a newer nodejs, say) serves as well.
        case $package in
            nodejs) command -v node >/dev/null && continue ;;
            vim-tiny) command -v vim >/dev/null && continue ;;
            golang-go) command -v go >/dev/null && continue ;;
            default-jdk-headless) command -v javac >/dev/null && continue ;;
            python3) command -v python3 >/dev/null && continue ;;
            curl) command -v cargo >/dev/null && continue ;;
        esac
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
    done
}

install() {
    local wanted
    mapfile -t wanted < <(missing "$@")
    [ ${#wanted[@]} -gt 0 ] || return 0
    echo "installing ${wanted[*]}"
    # Daemons that packages bring are not to be started here.
    local policy=/usr/sbin/policy-rc.d mine=
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' > $policy
        chmod 755 $policy
        mine=yes
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null
    [ -z "$mine" ] || rm -f $policy
}

have_sources() {
    [ -e target/sources/lua5.4/Makefile ]
}

# A real source package for the compiler tests. Fetched with lists of our own, so that the machine's are not changed.
source_package() {
    local package=lua5.4 to=target/sources
    have_sources && return 0
    local apt=$PWD/$to/apt
    mkdir -p "$apt/lists/partial" "$to/$package"
    local mirror
    mirror=$(grep -rhoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d 2>/dev/null | grep -v snapshot | head -n1 || true)
    [ -n "$mirror" ] || { echo "no Debian archive in /etc/apt/sources.list" >&2; return 1; }
    echo "deb-src ${mirror% } bookworm main" > "$apt/sources.list"
    local with=(-o "Dir::Etc::SourceList=$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$apt/lists" -o APT::Sandbox::User=root)
    apt-get -qq "${with[@]}" update
    (cd "$to" && apt-get -qq "${with[@]}" source --download-only "$package")
    tar -xf "$to/${package}"_*.orig.tar.* -C "$to/$package" --strip-components=1
    rm -rf "$apt"
}

have_kernel() {
    [ -n "$(compgen -G 'target/kernel/boot/vmlinuz-*')" ]
}

# Debian's kernel for the virtual machine of the tests: unpacked here and not installed.
other_kernel() {
    have_kernel && return 0
    local package
    package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends:/ {print $2; exit}')
    mkdir -p target/kernel
    echo "fetching $package"
    (cd target/kernel && apt-get -qq -o APT::Sandbox::User=root download "$package")
    dpkg -x target/kernel/linux-image-*.deb target/kernel
    rm target/kernel/linux-image-*.deb
}

if [ "${1:-}" = --check ]; then
    [ "${2:-all}" = build ] || building+=("${testing[@]}")
    [ -z "$(missing "${building[@]}")" ] && { [ "${2:-all}" = build ] || { have_sources && have_kernel; }; }
    exit
fi
install "${building[@]}"
if [ "${1:-all}" = all ]; then
    install "${testing[@]}"
    source_package
    other_kernel
fi
