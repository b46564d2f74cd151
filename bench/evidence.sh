#!/usr/bin/env bash
# The tables of "A miniature" in docs/evaluation.md again, on a CPU with two cores in about an hour and a half:
#
#     make demo FULL=1
#     bash bench/evidence.sh GLUE_FOLDER
#
# GLUE_FOLDER has CoLA, RTE, SST-2 and WNLI in GLUE's official layout. What was done is kept under
# runs/evidence; settings, results and tables are copied to bench/results/evidence.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?the folder with CoLA, RTE, SST-2 and WNLI}
distilfast=${DISTILFAST:-.venv/bin/distilfast}
runs=runs/evidence
results=bench/results/evidence
full=runs/demo-full
# Five times the paper's rate, for models of a fifth of the size: at 2e-5 the teacher learns nothing
# of CoLA in three epochs.
rate="--learning_rate 1e-4 --processes 2"
mkdir -p "$runs" "$results"

keep() { # NAME, and the command's output on stdin
    grep -v '^report: ' | sed -e '${/^$/d}' | tee "$results/$1.md"
    cp "$runs/$1/settings.json" "$results/$1-settings.json"
    cp "$runs/$1/results.json" "$results/$1.json"
}

$distilfast glue --model teacher=$full/teacher/model distilled=$full/distilled/model \
    undistilled=$full/undistilled/model --data "$data" --tasks CoLA,RTE,SST-2,WNLI --seeds 5 $rate \
    --output $runs/glue | keep glue

$distilfast ablate --config configs/demo.yaml --set teacher=$full/teacher/model \
    data.prepared=$full/tokens steps=80 evaluate.every=0 tensorboard=false --data "$data" \
    --tasks SST-2 --seeds 5 $rate --epochs 1 --output $runs/ablation | keep ablation

$distilfast finetune --teacher $full/teacher/model $full/teacher/model $full/teacher/model \
    --student $full/distilled/model --task CoLA --data "$data" --seeds 5 $rate \
    --output $runs/ensemble | keep ensemble

$distilfast compare teacher=$full/teacher/model distilled=$full/distilled/model --depth_width \
    --no-compile --rounds 4 --output $runs/compare | keep compare

.venv/bin/python bench/finetuning.py --data "$data" --task SST-2
