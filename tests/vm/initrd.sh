#!/bin/bash
# Makes the file system of a small virtual machine: our programs, those given, and what they need, with init.sh as its first
# program. Unpacked into memory by the kernel, so it is a plain cpio archive.
#   initrd.sh KERNEL-DIRECTORY PROGRAMS-DIRECTORY ARCHIVE [PROGRAM...]
set -euo pipefail
kernel=$1 programs=$2 archive=$3
shift 3
here=$(cd "$(dirname "$0")" && pwd)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

mkdir -p "$root"/{bin,sbin,etc,proc,sys,dev,tmp,run,root,mos,lib/modules}
cp -a "$kernel"/lib/modules/. "$root/lib/modules/"
rm -rf "$root"/lib/modules/*/kernel/drivers/{gpu,ata,scsi,md,nvme,hwmon} "$root"/lib/modules/*/kernel/fs/{btrfs,xfs,nfs,smb,ceph}
for version in "$root"/lib/modules/*; do
    depmod -b "$root" "$(basename "$version")"
done
for name in mosrun mosd mosctl; do
    strip -o "$root/mos/$name" "$programs/$name"
done
for name in mosps mosmigrate mosmon; do
    ln -s mosctl "$root/mos/$name"
done

# A program with its libraries, at the places where they are here.
add() {
    local file path
    for path in "$@"; do
        [ -e "$path" ] || path=$(command -v "$path")
        for file in "$path" $(ldd "$path" 2>/dev/null | grep -o '/[^ ]*' || true); do
            mkdir -p "$root$(dirname "$file")"
            [ -e "$root$file" ] || cp -L "$file" "$root$file"
        done
    done
}
add /bin/bash ip "$@"
if [ -x /usr/bin/python3 ]; then
    python=$(readlink -f /usr/bin/python3)
    add "$python"
    ln -sf "$(basename "$python")" "$root/usr/bin/python3"
    library=/usr/lib/$(basename "$python")
    mkdir -p "$root$library"
    (cd "$library" && find . -name '__pycache__' -prune -o -name 'config-*' -prune -o -name test -prune -o \
        \( -name '*.py' -o -name '*.so' \) -print0 | cpio -0 -pdm --quiet "$root$library")
    for extension in "$root$library"/lib-dynload/*.so; do
        add "${extension#"$root"}"
    done
    # Loaded by the C library when a thread ends.
    libgcc=$(ldconfig -p | awk '/libgcc_s.so.1.*x86-64/ {print $NF; exit}')
    mkdir -p "$root$(dirname "$libgcc")"
    cp -L "$libgcc" "$root$libgcc"
fi
cp /bin/busybox "$root/bin/busybox"
for name in $(/bin/busybox --list); do
    [ "$name" = ip ] || [ -e "$root/bin/$name" ] || ln -s busybox "$root/bin/$name"
done
printf 'root:x:0:0:root:/root:/bin/bash\n' > "$root/etc/passwd"
printf 'root:x:0:\n' > "$root/etc/group"
cp "$here/init.sh" "$root/init"
chmod 755 "$root/init"
(cd "$root" && find . -print0 | cpio -0 -o -H newc --quiet) > "$archive.new"
mv "$archive.new" "$archive"
