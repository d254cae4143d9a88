#!/usr/bin/env bash
# From a fresh checkout to a table: pretrained VLM -> fine-tune it with STTS, and with a rule -> compare with training-free.
# Needs Python >= 3.11 with venv, and git; no GPU, no compiler, no DeepSpeed.
# Takes 2 to 4 minutes on 2 idle CPU cores after the install (docs/quickstart.md).
# 2 GB of disk (a CUDA build of torch: 8 GB).
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
vlm="stts/assets/shapes_vlm_frozen_tower" # pretrained by configs/shapes_pretrain_world.yaml
out="runs/quickstart"

step "1/4 drawing ShapesQA with distractors, MP4 clips with questions, into $out/data"
"$stts" data shapes --out "$out/data" --train 0 --val 0 --test 200 \
  --form.families '[order,count,flash]' --form.families_per_clip 3 --form.ask_by colour \
  --form.active_share 0.75 --form.distractors '[3,5]' --processes 2

step "2/4 fine-tuning $vlm with STTS into $out/stts"
echo "Beside it the same with a rule, evs, into $out/evs; what it prints is in $out/evs.log."
fit=("$stts" fit --config configs/shapes_teacher.yaml --model.model "$vlm" --out)
"${fit[@]}" "$out/evs" --model.pruner evs --model.pruner_options null --model.loss_weights '{answer: 1.0}' \
  --model.retention_ratio 0.25 >"$out/evs.log" 2>&1 &
rule=$!
trap 'kill "$rule" 2>/dev/null || true' EXIT # stopped with this script, which goes on with both when it is run again
"${fit[@]}" "$out/stts"
if ! wait "$rule"; then
  tail -n 20 "$out/evs.log" >&2
  fail "Fine-tuning with the rule evs failed: the end of $out/evs.log is above."
fi
trap - EXIT

step "3/4 comparing dense, fine-tuned and training-free at equal token budgets"
# two processes share the questions; the answers are those of one process
"$VENV/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 -m stts.cli compare \
  --model "$vlm" --trained "{stts: $out/stts/model, evs-tuned: $out/evs/model}" \
  --pruners '[evs,visionzip,fastvid,holitom,tango,vidcom2,fastv,random]' \
  --data "$out/data/test.jsonl" --out "$out/compare" --retention_ratios '[0.25,0.15]' --max_new_tokens 2 \
  --batch_size 25 --save_kept 20 --name 'ShapesQA with distractors, small LLaVA-OneVision'

step "4/4 writing the report"
"$stts" report "$out/compare" --out "$out/report.html"

step "done. The page to open: $out/report.html. The model: $out/stts/model. Every answer: $out/compare"
