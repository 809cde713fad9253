#!/usr/bin/env bash
# Stage 2: distillation as supervised fine-tuning. 128 GPUs, as in the paper.
#   sbatch slurm/sft.sh [--config conf/sft/PRESET.yaml] [key=value ...]
#SBATCH --job-name=phimr-sft
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=1-00:00:00
#SBATCH --dependency=singleton
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.log
set -euo pipefail

# sbatch runs a copy of this script, so its own place says nothing inside a job.
PHIMR_HOME=${PHIMR_HOME:-${SLURM_SUBMIT_DIR:-$(dirname -- "${BASH_SOURCE[0]}")/..}}
# shellcheck source=slurm/common.sh
source "$PHIMR_HOME/slurm/common.sh"
run_distributed sft "$@"
