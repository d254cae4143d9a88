#!/usr/bin/env bash
# lmms-eval with our models, in an environment of its own (.venv-lmms-eval: 1.1 GB beside torch, 1 to 2 minutes).
#
#   bash scripts/lmms_eval.sh --model stts --model_args pretrained=FOLDER,pruner=tango,retention_ratio=0.1,num_frames=32 \
#     --tasks videomme --log_samples --output_path runs/videomme        # any arguments are those of lmms-eval
#   bash scripts/lmms_eval.sh       # none: the cross-check. Both frameworks ask the shipped small model the same
#                                   # questions; their answers must be equal. Half a minute on 2 CPU cores, offline.
#
# Needs what quickstart.sh needs; a torch in .venv is used again.
set -euo pipefail
# shellcheck source=scripts/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

if [ -z "${PYTHON:-}" ] && [ -x "$VENV/bin/python" ]; then PYTHON="$VENV/bin/python"; fi
VENV="${STTS_LMMS_VENV:-$ROOT/.venv-lmms-eval}"
pins() { grep -vE '^av==' "$ROOT/constraints.txt"; } # lmms-eval wants av<16, which is in our range too

check_basics
set_up lmms-eval
# `import stts` first: it makes a torchvision wheel that was built for another torch importable (stts/_compat.py).
lmms_eval() { "$VENV/bin/python" -c 'import stts, sys; from lmms_eval.cli.dispatch import main; sys.exit(main())' "$@"; }
if [ $# -gt 0 ]; then
  lmms_eval "$@"
  exit
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
out="${STTS_LMMS_OUT:-$ROOT/runs/lmms_eval}"
vlm="$ROOT/stts/assets/shapes_vlm" pruner=tango ratio=0.25
export HF_HOME="$out/cache" # the questions as lmms-eval's `datasets` keeps them; nothing of the user's own cache

step "1/3 drawing ShapesQA into $out/data"
"$VENV/bin/stts" data shapes --out "$out/data" --train 0 --val 0 --test 6 --form.families '[order,count,flash]' --form.ask_by colour

step "2/3 lmms-eval: $pruner at $ratio"
rm -rf "$out/lmms-eval" "$out/compare"
(cd "$out/data" && lmms_eval --model stts --batch_size 4 --tasks shapesqa --log_samples \
  --include_path "$ROOT/stts/assets/lmms_eval" --output_path "$out/lmms-eval" \
  --model_args "pretrained=$vlm,pruner=$pruner,retention_ratio=$ratio,num_frames=16")

step "3/3 stts compare: the same questions"
"$VENV/bin/stts" compare --model "$vlm" --data "$out/data/test.jsonl" --out "$out/compare" --batch_size 3 \
  --pruners "[$pruner]" --retention_ratios "[$ratio]"
"$VENV/bin/python" - "$out" "$pruner@$ratio" <<'PY'
import json
import pathlib
import sys

out, cell = pathlib.Path(sys.argv[1]), sys.argv[2]
samples = list((out / "lmms-eval").rglob("*_samples_shapesqa.jsonl"))
if not samples:  # it ends with 0 when it fails
    sys.exit("lmms-eval wrote no answers: see its error above")
theirs = [json.loads(line) for line in samples[0].read_text(encoding="utf-8").splitlines()]
theirs = [line["filtered_resps"] for line in sorted(theirs, key=lambda line: line["doc_id"])]
ours = json.loads((out / "compare" / "comparison.json").read_text(encoding="utf-8"))["records"]
pairs = [(one["uid"], one["outcomes"][cell]["prediction"].strip(), said) for one, said in zip(ours, theirs, strict=True)]
same = sum(a == b for _, a, b in pairs)
print(f"\nlmms-eval and stts compare: {same} of {len(pairs)} answers are the same")
for uid, a, b in pairs:
    if a != b:
        print(f"  {uid}: compare {a!r}, lmms-eval {b!r}")
sys.exit(same != len(pairs) or not pairs)
PY
