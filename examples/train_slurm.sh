#!/bin/bash
# One expert a task of a job array, all GPUs of a node for each: the experts of a model do not talk while they train.
#
#     sbatch examples/train_slurm.sh tokens codec run
#
# Submit the same line again to go on after a failure or the time limit; a task whose expert is trained ends at once.
# The last task to finish makes RUN/checkpoint. A model with another number of experts wants another --array.

#SBATCH --job-name=siren
#SBATCH --array=0-5
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%A-%a.log

# --signal=TERM@120 goes to the steps of the job (srun), 120 seconds before the limit: time to save a state. torchrun
# kills its processes 30 seconds after it; newer versions wait longer with --shutdown-timeout=100.
set -euo pipefail
tokens=$1 codec=$2 run=$3

# 24 clips a GPU, as in the paper. Keep clips a step (GPUs x batch size x accumulate) when you change the GPUs: a run
# goes on only with the settings that it began with.
srun --kill-on-bad-exit=1 torchrun --standalone --nproc-per-node=gpu --no-python \
    siren train "$tokens" --codec "$codec" --out "$run" --config siren-1.6b --experts "$SLURM_ARRAY_TASK_ID" \
    --precision bf16 --batch-size 24 --epochs 40 --warmup-steps 2000 --save-every 500 --val-every 2000

# More nodes for each expert: --nodes=2, and instead of --standalone
#     --nnodes="$SLURM_NNODES" --rdzv-backend=c10d --rdzv-endpoint="$(scontrol show hostnames | head -n 1):29500"
# Weights that do not fit a GPU: --fsdp. One GPU for each expert: leave torchrun out.
