#!/usr/bin/env bash
# Verdicts -> training sets; CPU only. The tasks of the array share the shards of verdicts and those of the sets; one of
# them decides over all.
#   sbatch slurm/curate.sh [--config conf/curate/PRESET.yaml] [key=value ...]
#SBATCH --job-name=phimr-curate
#SBATCH --array=0-15
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
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
run_plain curate "$@"
