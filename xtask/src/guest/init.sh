#!/bin/busybox sh
# The guest's first process. Twice: in the kernel's first file system, out of which no container can pivot, and then
# in a tmpfs with the same files.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root

if [ ! -e /in-place ]; then
    busybox mkdir -p /place /proc
    busybox mount -t tmpfs -o size=80%,mode=755 root /place
    busybox mount -t proc proc /proc
    for entry in /*; do
        case $entry in
        /place | /proc | /init | /bin) ;;
        # Moved one by one, so that nothing is there twice.
        *) busybox mv "$entry" /place/ ;;
        esac
    done
    busybox cp -a /bin /init /place/
    busybox umount /proc
    busybox mkdir -p /place/proc
    : > /place/in-place
    exec busybox switch_root /place /init
fi

busybox mount -t proc proc /proc
busybox --install -s /bin
mkdir -p /sys /dev /run /tmp /root /var/tmp
chmod 1777 /tmp
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec > /dev/ttyS0 2>&1 < /dev/null
# Open from here on: what comes in while nobody has it open is lost.
exec 3<> /dev/ttyS1
stty -F /dev/ttyS1 raw -echo
while read -r module; do insmod "$module"; done < /guest/modules
hostname guest
ifconfig lo up
# A session of its own in a cgroup of its own, as a service manager would have it.
mkdir /sys/fs/cgroup/init
echo $$ > /sys/fs/cgroup/init/cgroup.procs

say() { echo "$*" >&3; }
task=
for word in $(cat /proc/cmdline); do
    case $word in foreshore.task=*) task=${word#*=} ;; esac
done
say "up $(uname -r)"
. "/guest/$task.sh"
say done
sync
poweroff -f
