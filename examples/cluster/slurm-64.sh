#!/bin/bash
# 64 GPUs, eight nodes of eight: sbatch examples/cluster/slurm-64.sh --model M --task T
# After the time limit, or whatever ended it: sbatch examples/cluster/slurm-64.sh --resume runs/NAME
#SBATCH --job-name=estune
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
source "$HOME/estune/bin/activate" # on a disk that all nodes see, as is the model

# This script runs on the first node, which becomes the head. Only who has the token can talk to the cluster.
RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
head=$(hostname)
ray start --head --port 6379
trap "ray stop" EXIT
others=$((SLURM_JOB_NUM_NODES - 1))
srun --nodes="$others" --ntasks="$others" --cpus-per-task="$SLURM_CPUS_PER_TASK" --exclude="$head" \
  ray start --address "$head:6379" --block &

# Nothing waits for the other nodes: their workers join when they are there.
estune train --workers 64 --ray-address auto "$@"
