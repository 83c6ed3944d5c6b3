#!/usr/bin/env bash
# Makes siren-mini, the model in the package, from nothing: sounds, codec, tokens, six experts. CPU only; run it from the
# repository's root. What is there already is kept, and whatever was stopped goes on. Downloads 1 GB of Debian packages.
set -euo pipefail
out=${1:-out/mini}
here=$(dirname "$0")
mkdir -p "$out"

[ -e "$out/recordings" ] || siren data recordings "$out/recordings"
siren data procedural "$out/procedural" --clips 2400 --seconds 4 --scenes 0.15 --seed 0
[ -e "$out/codec" ] ||
    siren train-codec "$out/recordings" "$out/procedural" --out "$out/codec" --max-frames 120000 --iterations 10
siren data tokenize "$out/recordings" "$out/procedural" --out "$out/tokens" --codec "$out/codec" \
    --seconds 4 --pad-seconds 1

# Two processes of one thread each: faster on two cores than one process of two.
train() {
    OMP_NUM_THREADS=1 siren train "$out/tokens" --out "$out/run" --experts "$1" --config "$here/config.json" \
        --codec "$out/codec" --max-steps 3500 --batch-size 8 --crop-seconds 4 --bucket 8 --prompt-dropout 0.1 \
        --learning-rate 1.5e-3 --warmup-steps 100 --min-lr-ratio 0.05 --val-fraction 0.04 --save-every 250 \
        --checkpoint-dtype bfloat16 --device cpu
}
train 0,2,4 &
other=$!
train 1,3,5
wait "$other"
echo "$out/run/checkpoint"
