#!/bin/sh
# First program of the virtual machine: takes part in the cluster whose invitation the kernel's command line has, and then
# executes each line that it reads from the console.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
if [ -z "$AGAIN" ]; then
    # The kernel's first file system cannot be left, which cages need: go on in another.
    export AGAIN=1
    mkdir /next
    mount -t tmpfs -o size=75%,mode=755 root /next
    for name in bin sbin etc lib lib64 usr mos init; do
        [ -e /$name ] && cp -a /$name /next/
    done
    mkdir -p /next/proc /next/sys /next/dev /next/tmp /next/run /next/root
    umount /dev /sys /proc
    exec switch_root /next /init
fi
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs run /run
mkdir -p /sys/fs/cgroup
mount -t cgroup2 cgroup /sys/fs/cgroup
export PATH=/mos:/usr/bin:/bin:/usr/sbin:/sbin HOME=/root TERM=dumb
for module in virtio_pci virtio_net; do
    modprobe $module
done
option() {
    tr ' ' '\n' < /proc/cmdline | sed -n "s/^mosrun\\.$1=//p"
}
# As systemd sets it: pids of the other nodes are to be possible here.
echo 4194304 > /proc/sys/kernel/pid_max
hostname vm
ip link set lo up
ip link set eth0 up
ip address add "$(option address)" dev eth0
mosctl cluster join "$(option invitation)" && mosd && echo "=== ready"
while read -r line; do
    bash -c "$line" < /dev/null
    echo "=== status $?"
done
poweroff -f
