#!/bin/bash
# Several hosts on one machine, for tests of training over a network.  A host has namespaces of its own: network
# (address 10.83.0.I, interface eth0), processes, host name, shared memory and mounts.  A bridge joins the links.
#   cluster.sh up N [RATE]          hosts 1 to N; RATE of each link as tc writes it (1gbit, 100mbit); default: no limit
#   cluster.sh hold N [RATE]        the same until standard input ends or a signal comes; prints "ready"; for tests
#   cluster.sh run OPTION... PROGRAM   mpirun with these arguments, started on host 1, ranks dealt to the hosts in turn
#   cluster.sh on I COMMAND...      a command on host I
#   cluster.sh cut I | heal I       pull the cable out of host I | put it back
#   cluster.sh rate I RATE          another rate for host I's link, both ways
#   cluster.sh processes I          the processes of host I
#   cluster.sh kill I               ends host I and all of its processes at once
#   cluster.sh bytes                host, bytes received, bytes sent
#   cluster.sh down                 ends all hosts
# CLUSTER names the set's folder (default /run/kiln-cluster): several sets may stand side by side.
# Needs root and iproute2.  Exit code: that of the command; 2 usage; 3 this machine cannot make such hosts.
set -euo pipefail
self=$(readlink -f "${BASH_SOURCE[0]}")
export CLUSTER=${CLUSTER:-/run/kiln-cluster}
subnet=10.83.0

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$self"; }
cannot() { echo "cluster.sh: $*" >&2; exit 3; }
enter() {  # host (0: the switch), options of nsenter that choose namespaces, command
    local pid
    pid=$(cat "$CLUSTER/$1" 2>/dev/null) || { echo "cluster.sh: no host $1 in $CLUSTER" >&2; exit 2; }
    nsenter --target "$pid" "${@:2}"
}
hosts() { find "$CLUSTER" -maxdepth 1 -name '[1-9]*' -printf '%f\n' | sort -n; }

# Starts the first process of a host.  When it ends, the kernel ends all others of the host and takes its network away.
# It ends with the process that holds the set, however that one ends.
start_host() {
    # shellcheck disable=SC2016  # the inner shell expands these
    setpriv --pdeathsig KILL unshare --net --pid --uts --ipc --mount --fork --kill-child bash -c '
        exec 2>&3  # here unshare says no more than that its child was killed
        read -r pid _ </proc/self/stat  # as processes outside see it, until /proc shows the host alone
        mount -t proc proc /proc && mount -t tmpfs tmpfs /dev/shm && hostname "host-$1" && ip link set lo up || exit
        echo "$pid" >"$CLUSTER/new" && mv "$CLUSTER/new" "$CLUSTER/$1"
        read -r <> <(:)  # waits for ever; bash also collects the dead of its host
        ' start_host "$1" </dev/null >/dev/null 3>&2 2>/dev/null &
    local started=$!
    disown $started  # its end is no news
    until [ -e "$CLUSTER/$1" ]; do
        kill -0 $started 2>/dev/null || cannot "the kernel gives no namespaces here; root is needed, with CAP_SYS_ADMIN"
        sleep 0.01
    done
}
connect() {  # host, rate
    ip link add eth0 netns "$(cat "$CLUSTER/$1")" type veth peer name "p$1" netns "$(cat "$CLUSTER/0")" ||
        cannot "no virtual links (veth) in this kernel"
    enter 0 --net ip link set "p$1" master br0 up
    enter "$1" --net ip addr add "$subnet.$1/24" dev eth0
    enter "$1" --net ip link set eth0 up
    [ -z "$2" ] || limit "$1" "$2"
}
limit() {  # host, rate
    local filter=(root tbf rate "$2" burst 256kb latency 200ms)
    if ! { enter "$1" --net tc qdisc replace dev eth0 "${filter[@]}" &&
        enter 0 --net tc qdisc replace dev "p$1" "${filter[@]}"; }; then
        cannot "no token bucket filter (tbf) in this kernel, or not a rate: $2"
    fi
}

case ${1:-} in
    hold)
        [ $# -ge 2 ] || { usage >&2; exit 2; }
        [ "$(id -u)" = 0 ] || cannot "needs root"
        command -v ip tc >/dev/null || cannot "needs ip and tc (package iproute2)"
        mkdir "$CLUSTER" || { echo "cluster.sh: $CLUSTER is there; cluster.sh down removes it" >&2; exit 2; }
        trap 'kill -KILL $(cat "$CLUSTER"/[0-9]*) 2>/dev/null; rm -rf "$CLUSTER"' EXIT
        trap exit HUP INT TERM
        echo $$ >"$CLUSTER/holder"
        start_host 0
        enter 0 --net ip link add br0 type bridge || cannot "no bridge in this kernel"
        enter 0 --net ip link set br0 up
        for ((i = 1; i <= $2; i++)); do
            start_host $i
            connect $i "${3:-}"
            echo "$subnet.$i" >>"$CLUSTER/hostfile"
        done
        echo ready
        cat >/dev/null <&0 &
        wait $! ;;
    up)
        coproc HOLDER { exec setsid "$self" hold "${@:2}" <> <(:); }  # its standard input never ends
        holder=$HOLDER_PID
        read -r _ <&"${HOLDER[0]}" || wait "$holder" ;;
    run)
        # Also the ranks of host 1 start through the stand-in for ssh, in host 1's namespaces of processes and mounts.
        here=$(dirname "$self")
        HYDRA_LAUNCHER_AUTOFORK=0 SSH=$here/ssh.sh MPIRUN=${MPIRUN:-mpiexec.mpich} \
            enter 1 --net --uts "$here/../mpirun_ssh.sh" "$CLUSTER/hostfile" "${@:2}" ;;
    on) enter "$2" --all "${@:3}" ;;
    cut) enter 0 --net ip link set "p$2" down ;;
    heal) enter 0 --net ip link set "p$2" up ;;
    rate) limit "$2" "$3" ;;
    processes)
        first=$(cat "$CLUSTER/$2")
        for p in /proc/[0-9]*; do
            if [ "$p/ns/pid" -ef "/proc/$first/ns/pid" ] && [ "$p" != "/proc/$first" ]; then
                echo "${p#/proc/} $(tr '\0' ' ' <"$p/cmdline")"
            fi
        done ;;
    kill) kill -KILL "$(cat "$CLUSTER/$2")" && rm "$CLUSTER/$2" ;;
    bytes)
        for i in $(hosts); do
            echo "$i $(enter "$i" --net grep eth0: /proc/net/dev)" | awk '{print $1, $3, $11}'
        done ;;
    down)
        while kill "$(cat "$CLUSTER/holder" 2>/dev/null)" 2>/dev/null; do sleep 0.02; done
        rm -rf "$CLUSTER" ;;  # there only if its holder was killed
    -h | --help) usage ;;
    *) usage >&2; exit 2 ;;
esac
