#!/usr/bin/env bash
# From a fresh checkout to a table: pretrained VLM -> fine-tune it with STTS -> compare learned with training-free.
# Needs Python >= 3.11 with venv, and git; no GPU, no compiler, no DeepSpeed.
# Takes at most 10 minutes on 2 CPU cores after the install, and 2 GB of disk (a CUDA build of torch: 8 GB).
set -euo pipefail
# shellcheck source=scripts/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

check_basics
set_up fit
cd "$ROOT" # outputs and the paths inside configs/ are relative to the checkout
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" # the model is small: more threads only wait for one another
stts="$VENV/bin/stts"
out="runs/quickstart"
vlm="stts/assets/shapes_vlm"

step "1/4 drawing ShapesQA, real MP4 clips with questions, into $out/data"
"$stts" data shapes --out "$out/data"

if [ -d "$vlm" ]; then
  step "2/4 the pretrained small VLM is $vlm, shipped with this checkout"
else
  vlm="$out/vlm"
  step "2/4 stts/assets/shapes_vlm is absent: pretraining it for some minutes into $vlm"
  "$stts" fit --config configs/shapes_pretrain.yaml --out "$vlm"
fi

step "3/4 fine-tuning it with STTS into $out/stts"
"$stts" fit --config configs/shapes_stts.yaml --vlm "$vlm" --out "$out/stts"

step "4/4 comparing dense, learned and training-free at equal token budgets"
"$stts" compare --vlm "$out/stts" --data "$out/data" --out "$out/compare"

step "done; everything is in $ROOT/$out"
