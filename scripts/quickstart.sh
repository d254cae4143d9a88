#!/usr/bin/env bash
# From a fresh checkout to a table: pretrained VLM -> fine-tune it with STTS -> compare learned with training-free.
# Needs Python >= 3.11 with venv, and git; no GPU, no compiler, no DeepSpeed.
# Takes 6 to 8 minutes on 2 CPU cores after the install, and 2 GB of disk (a CUDA build of torch: 8 GB).
set -euo pipefail
# shellcheck source=scripts/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

check_basics
set_up fit
cd "$ROOT" # outputs and the paths inside configs/ are relative to the checkout
# Two processes of one thread each: in a model this small, threads of one process mostly wait for one another.
export OMP_NUM_THREADS=1
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}" # waiting threads sleep: other work on the cores is not starved
export CUDA_VISIBLE_DEVICES="" # two processes fit two cores; one GPU would be too few
export HF_HUB_DISABLE_PROGRESS_BARS=1 # nothing is downloaded, and loading 4 MB needs no bar
stts="$VENV/bin/stts"
two() { "$VENV/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 -m stts.cli "$@"; }
vlm="stts/assets/shapes_vlm" # pretrained by configs/shapes_pretrain_small.yaml
out="runs/quickstart"

step "1/4 drawing ShapesQA, MP4 clips with questions, into $out/data"
"$stts" data shapes --out "$out/data" --train 3000 --val 100 --test 150 \
  --form.families '[order,count,flash]' --form.families_per_clip 3 --form.questions_per_family 2 \
  --form.ask_by colour --form.num_glares 1 --form.active_share 0.75 --processes 2

step "2/4 fine-tuning $vlm with STTS into $out/stts"
# half of a step's tokens each: the same steps as in one process
two fit --config configs/shapes_stts.yaml --model.model "$vlm" --out "$out/stts" --data.max_tokens 900 --data.num_workers 0

step "3/4 comparing dense, learned and training-free at equal token budgets"
# the processes share the questions; the answers are those of one process
two compare \
  --model "$out/stts/model" --baseline_model "$vlm" --data "$out/data/test.jsonl" --out "$out/compare" \
  --pruners '[stts,visionzip,fastvid,holitom,stop-holitom,tango,vidcom2,fastv,novelty,random]' \
  --retention_ratios '[0.5,0.3]' --save_kept 20 --name 'ShapesQA, small LLaVA-OneVision'

step "4/4 writing the report"
"$stts" report "$out/compare" --out "$out/report.html"

step "done. The page to open: $out/report.html. The model: $out/stts/model. Every answer: $out/compare"
