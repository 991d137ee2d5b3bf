#!/bin/bash
# Who may include whom:  train -> model -> comm -> kernels -> common    train -> data -> common    test -> anything
# Prints every include that points the wrong way, and fails if there is one.
set -euo pipefail
bad=0
check() {  # folder, then the folders it may include
    local folder=$1 allowed
    shift
    allowed=$(IFS='|'; echo "$*")
    local found
    found=$(grep -rnE '^#include "(common|kernels|comm|model|data|test)/' "$folder" | grep -vE "#include \"($allowed)/" || true)
    [ -z "$found" ] && return
    echo "$folder/ may include only: $*"
    echo "$found"
    bad=1
}
check common common
check kernels kernels common
check comm comm kernels common
check model model comm kernels common
check data data common
exit $bad
