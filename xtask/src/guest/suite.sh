# The tests make their directories here.
mount -t ext4 /dev/vda /var/tmp
chmod 1777 /var/tmp
export TMPDIR=/var/tmp
# Runs each line of /guest/tests: a name, a limit in seconds, a command.
while read -r name limit command; do
    echo "=== $name"
    say "begin $name"
    cd /tmp || exit 1
    timeout -s KILL "$limit" $command
    say "end $name $?"
done < /guest/tests
