#!/bin/bash
# One GPU: sbatch examples/cluster/slurm-1.sh --model M --task T
# After the time limit, or whatever ended it: sbatch examples/cluster/slurm-1.sh --resume runs/NAME
#SBATCH --job-name=estune
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
source "$HOME/estune/bin/activate"

estune train "$@"
