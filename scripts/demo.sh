#!/usr/bin/env bash
# From a fresh clone to features of real photographs on disk: installs into .venv, writes a small random-weight
# checkpoint, and runs `vitrt encode` over the photographs that come with scikit-image.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
environment demo

output=demo-output
checkpoint="$output/checkpoint"
photos="$output/photos"
features="$output/features"

if [[ ! -d "$checkpoint" ]]; then
    echo "== writing a small Qwen3-VL checkpoint with random weights"
    python scripts/make_checkpoint.py "$checkpoint" --model qwen3_vl
fi
python scripts/demo.py photos "$photos"

echo "== vitrt encode $checkpoint $photos --output $features"
vitrt encode "$checkpoint" "$photos" --output "$features" --overwrite

echo "== what came out"
python scripts/demo.py report "$features"
