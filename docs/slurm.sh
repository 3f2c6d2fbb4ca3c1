#!/bin/bash
# Train on 64 GPUs, 8 per machine: sbatch docs/slurm.sh
# First change the paths and the numbers of machines and CPUs to yours.
#
# After a machine fails, --requeue starts the job again. After an error or the time limit,
# the last line does.
#SBATCH --nodes=8 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
#SBATCH --requeue --open-mode=append --signal=TERM@300

# Seconds to save after a signal. By default, torchrun allows 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280
# A prune changes sizes. Without this setting, memory would be lost in gaps.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --cpus-per-task=64 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 \
    --rdzv_backend=c10d --rdzv_endpoint="$first:29500" --rdzv_id="$SLURM_JOB_ID" \
    train.py configs/idea_2.8b.py --resume --out_dir=/shared/idea_2.8b --data_dir=/shared/fineweb ||
    { [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ] && scontrol requeue "$SLURM_JOB_ID"; }
