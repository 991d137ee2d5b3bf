#!/bin/bash
# make demo: text from this machine -> shards -> training on 2 ranks -> loss picture and generated text.
# Usage: scripts/demo.sh CONFIG [--set key=value ...]     (PYTHON and MPIRUN name the programs to use)
set -euo pipefail
config=$1
shift
python=${PYTHON:-python3} mpirun=${MPIRUN:-mpirun}

echo "== text: the Python standard library's sources on this machine, as bytes"
"$python" scripts/prepare_data.py --python-stdlib --out runs/demo-data --overwrite
echo "== training: mpirun -np 2 ./train --config $config --overwrite"
"$mpirun" -np 2 ./train --config "$config" --overwrite "$@"
echo "== picture: runs/demo/loss.png"
"$python" scripts/plot_loss.py runs/demo
echo "== generated text"
./train generate --config "$config" "$@" --prompt "def " --max-tokens 400 --temperature 0.7 --seed 3
grep '"type":"eval"' runs/demo/metrics.jsonl | tail -1 | sed -E 's/.*"step":([0-9]+).*"val_loss":([0-9.]+).*/== val loss after step \1: \2 nats per byte/'
