#!/bin/bash
# mpirun's stand-in for ssh among the hosts of cluster.sh: ssh.sh [OPTION]... ADDRESS COMMAND...
# Like ssh, it cannot reach a host whose cable is out.
while [[ $1 == -* ]]; do shift; done
host=${1##*.}
if ! nsenter --target "$(cat "$CLUSTER/0")" --net ip -o link show "p$host" 2>/dev/null | grep -q LOWER_UP; then
    echo "ssh.sh: connect to host $1: No route to host" >&2
    exit 255
fi
exec nsenter --target "$(cat "$CLUSTER/$host")" --all bash -c "${*:2}"
