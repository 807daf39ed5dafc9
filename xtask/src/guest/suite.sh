# Runs each line of /guest/tests: a name, a limit in seconds, a command.

# Swap, so that there is something that containers may not use.
mkswap /dev/vda > /dev/null && swapon /dev/vda || exit 1

# A disk for what the tests make: on a tmpfs this kernel maps no ids.
mount -t ext4 -o noatime /dev/vdb /var/tmp && chmod 1777 /var/tmp || exit 1
export TMPDIR=/var/tmp

while read -r name limit command; do
    echo "=== $name"
    say "begin $name"
    cd /var/tmp || exit 1
    timeout -s KILL "$limit" $command 3>&-
    say "end $name $?"
done < /guest/tests
