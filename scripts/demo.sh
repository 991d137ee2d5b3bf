#!/bin/bash
# make demo: text from this machine -> shards -> training on 2 ranks -> loss picture and generated text.
# Usage: scripts/demo.sh [--set key=value ...]     (PYTHON and MPIRUN name the programs to use)
# Exit code: 0 trained, 1 the last val loss is not below DEMO_MAX_VAL_LOSS (1.75 nats per byte), else that of a program
# that has failed.
set -euo pipefail
[[ ${1:-} != -h && ${1:-} != --help ]] || { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0; }
config=configs/demo.yaml
python=${PYTHON:-python3} mpirun=${MPIRUN:-mpirun}

echo "== text: the Python standard library's sources on this machine, as bytes"
"$python" scripts/prepare_data.py --python-stdlib --out runs/demo-data --overwrite
echo "== training: mpirun -np 2 ./train --config $config --overwrite"
"$mpirun" -np 2 ./train --config "$config" --overwrite "$@"
echo "== picture: runs/demo/loss.png"
"$python" scripts/plot_loss.py runs/demo
echo "== generated text"
./train generate --config "$config" "$@" --prompt "def " --max-tokens 400 --temperature 0.8 --seed 4
"$python" - "${DEMO_MAX_VAL_LOSS:-1.75}" <<'END'
import json, sys
last = [r for r in map(json.loads, open("runs/demo/metrics.jsonl")) if r["type"] == "eval"][-1]
loss = last["val_loss"]  # null: not a number
print(f"== val loss after step {last['step']}: {loss if loss is None else round(loss, 4)} nats per byte (bound {sys.argv[1]})")
sys.exit(loss is None or not loss < float(sys.argv[1]))
END
