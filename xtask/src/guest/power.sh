# An agent that works on a disk, and answers to questions until the power goes.
agent=/guest/foreshore-agent config=/etc/foreshore/agent.toml
ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
mkdir -p /data
mount -t ext4 /dev/vda /data || { say unmountable; poweroff -f; }

# What is on the disk, told before the agent can change it.
say "disk $($agent status --config $config -o json | tr -d '\n')"

# As a service manager would have it: started again when it ends.
{ while true; do $agent run --config $config 3>&-; echo "the agent ended with $?"; sleep 2; done; } 2>&1 | cat &
say started

facts() {
    for dir in /sys/fs/cgroup/foreshore/*.*; do
        [ -d "$dir" ] || continue
        while read -r pid; do
            release=$(tr '\0' '\n' < "/proc/$pid/environ" | sed -n 's/^VERSION=//p')
            say "process ${dir##*/} $release"
        done < "$dir/cgroup.procs"
        say "cgroup ${dir##*/}"
    done
    for dir in /run/foreshore/containers/*; do
        [ -e "$dir" ] && say "run ${dir##*/}"
    done
    for dir in /data/state/containers/*; do
        [ -e "$dir" ] && say "writable ${dir##*/}"
    done
    find /data/state -name '*.corrupt-*' | while read -r file; do say "corrupt $file"; done
    find /data/state -maxdepth 2 -name '*.new' | while read -r file; do say "half $file"; done
    grep -cE ' /(data|run/foreshore)/' /proc/mounts | while read -r count; do say "mounts $count"; done
    [ -e /run/foreshore/status.json ] && say "status $(tr -d '\n' < /run/foreshore/status.json)"
    say told
}

while read -r order; do
    case $order in
    facts) facts 2> /dev/null ;;
    esac
done <&3
