#!/usr/bin/env bash
# Stage 4: GRPO with a verifiable reward.
#   sbatch slurm/grpo.sh [--config conf/grpo/PRESET.yaml] [key=value ...]
# With rollout servers on two more nodes of the allocation, or on those of a second component:
#   PHIMR_SERVER_NODES=2 sbatch --nodes=6 slurm/grpo.sh ...
#   sbatch --nodes=4 --gpus-per-node=8 : --nodes=2 --gpus-per-node=8 --partition=other slurm/grpo.sh ...
# On the trainer's own GPUs, in turns:
#   PHIMR_COLOCATED=1 sbatch slurm/grpo.sh ...
#SBATCH --job-name=phimr-grpo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=2-00:00:00
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
run_with_servers grpo "$@"
