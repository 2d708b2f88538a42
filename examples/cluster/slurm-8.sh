#!/bin/bash
# Eight GPUs of one node: sbatch examples/cluster/slurm-8.sh --model M --task T
# After the time limit, or whatever ended it: sbatch examples/cluster/slurm-8.sh --resume runs/NAME
#SBATCH --job-name=estune
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
source "$HOME/estune/bin/activate"

estune train --workers 8 "$@"
