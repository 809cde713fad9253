#!/usr/bin/env bash
# Sources -> problems, and the rollouts of sources that bring trajectories; CPU only. The tasks of the array share the
# pieces of all sources, one for each core; one of them then decides over all and writes. It comes before the chain of
# pipeline.sh: then generate reads problems.kind=records problems.path=runs/paper/prepared/problems.
#   sbatch slurm/prepare.sh [--config conf/prepare/PRESET.yaml] [key=value ...]
#SBATCH --job-name=phimr-prepare
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%A_%a.log
set -euo pipefail

# sbatch runs a copy of this script, so its own place says nothing inside a job.
PHIMR_HOME=${PHIMR_HOME:-${SLURM_SUBMIT_DIR:-$(dirname -- "${BASH_SOURCE[0]}")/..}}
# shellcheck source=slurm/common.sh
source "$PHIMR_HOME/slurm/common.sh"
run_plain prepare "$@"
