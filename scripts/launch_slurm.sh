#!/bin/bash
# Fine-tune on one or more nodes of a SLURM cluster.
# Needs: sbatch; this repository and an environment with `stts` and `lightning` at the same path on every node; the
# videos and the model (folder or filled Hugging Face cache) readable from every node; `deepspeed` for its strategies.
#
#   sbatch --nodes=2 scripts/launch_slurm.sh configs/molmo2_4b_stts.yaml [--model.NAME VALUE ...]
#
# One task per GPU, as Lightning's SLURM support wants it: devices and nodes of the config are replaced by what SLURM
# gave. Five minutes before the time limit SLURM sends SIGTERM, and the run saves itself; the same sbatch again, or
# SLURM after a preemption, goes on from there (`--resume auto` is the default of `stts fit`). Look first, anywhere:
#   stts plan --config configs/molmo2_4b_stts.yaml --gpus 16;  stts fit --config ... --dry-run
#SBATCH --job-name=stts
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGTERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

if [[ $# -lt 1 || ! -f $1 ]]; then
  echo "usage: sbatch [--nodes=N] scripts/launch_slurm.sh CONFIG.yaml [options of stts fit]" >&2
  exit 2
fi
config=$1
shift
if [[ -z ${SLURM_JOB_NUM_NODES:-} ]]; then
  echo "error: this is a job script; hand it to sbatch. On one machine: stts fit --config $config" >&2
  exit 2
fi

export MASTER_ADDR MASTER_PORT
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # not piped into head: scontrol would die of the closed pipe
MASTER_ADDR=${nodes%%[[:space:]]*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # newer SLURM does not hand it on
# Loader workers share the cores of their task.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

exec srun --kill-on-bad-exit=1 stts fit --config "$config" \
  --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "${SLURM_NTASKS_PER_NODE:-8}" "$@"
