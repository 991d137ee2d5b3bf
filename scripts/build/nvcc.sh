#!/bin/bash
# Compiles one kernel file, and fails where ptxas silently gives up what the kernel was written for.
#   scripts/build/nvcc.sh OBJECT COMMAND...     the command must end with -o OBJECT
# The words of ptxas about each kernel stay in OBJECT.ptxas, for scripts/build/kernel_table.py; other output is shown.
# ptxas reports a serialized wgmma and an ignored setmaxnreg as information, which --warning-as-error leaves alone.
set -uo pipefail
object=$1
shift
loss="Potential Performance Loss|setmaxnreg'? ignored"
mkdir -p "$(dirname "$object")"
"$@" >"$object.ptxas" 2>&1
code=$?
grep -vE '^ptxas info|bytes stack frame' "$object.ptxas" >&2
if grep -E "$loss" "$object.ptxas" >&2; then code=1; fi
[ $code = 0 ] || rm -f "$object" # or the next make would take the object for built
exit $code
