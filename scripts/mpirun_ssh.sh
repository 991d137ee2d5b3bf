#!/bin/bash
# mpirun over the hosts of a hostfile, once ssh has reached each of them and found the same program there.  mpirun alone
# waits for ever for a host that cannot be reached.
#   scripts/mpirun_ssh.sh HOSTFILE [OPTION OF MPIRUN]... ./train --config configs/mine.yaml
# SSH and MPIRUN name other programs than ssh and mpirun.
# Exit code: that of mpirun; 2 usage, or a host has another program or none; 75 a host cannot be reached.
set -uo pipefail
hostfile=${1:-}
[ -r "$hostfile" ] || { echo "usage: scripts/mpirun_ssh.sh HOSTFILE [OPTION OF MPIRUN]... PROGRAM ..." >&2; exit 2; }
shift
ssh=$(command -v "${SSH:-ssh}") || { echo "mpirun_ssh.sh: no ${SSH:-ssh} here; install openssh-client" >&2; exit 2; }
for word in "$@"; do
    program=$(type -P -- "$word") && break
done
program=$(readlink -f "$program")
sum=$(cksum "$program") || exit 2

check() {  # host
    local said code
    said=$("$ssh" -oBatchMode=yes -oConnectTimeout=10 -oLogLevel=ERROR "$1" cksum "$program" 2>&1 </dev/null)
    code=$?
    said=${said##*$'\n'}  # not what ssh warns of before
    [ "$said" != "$sum" ] || return 0
    [ $code != 255 ] || { echo "mpirun_ssh.sh: error: host $1 cannot be reached: $said" >&2; return 75; }
    echo "mpirun_ssh.sh: error: $1 has $program as \"$said\", here it is \"$sum\"; copy it there" >&2
    return 2
}
checks=() worst=0
while read -r host; do
    check "$host" &
    checks+=($!)
done < <(sed 's/#.*//; s/[:[:space:]].*//; /^$/d' "$hostfile" | sort -u)
for one in "${checks[@]}"; do
    wait "$one"
    code=$?
    [ $code -le $worst ] || worst=$code
done
[ $worst = 0 ] || exit $worst
exec "${MPIRUN:-mpirun}" -launcher ssh -launcher-exec "$ssh" -f "$hostfile" "$@"
