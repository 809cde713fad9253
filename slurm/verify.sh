#!/usr/bin/env bash
# Rollouts -> verdicts, one array task for each part of the shards; CPU only.
#   sbatch slurm/verify.sh [--config conf/verify/PRESET.yaml] [key=value ...]
#SBATCH --job-name=phimr-verify
#SBATCH --array=0-63
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
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
run_plain verify "$@"
