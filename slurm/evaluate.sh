#!/usr/bin/env bash
# A model -> pass@1 with its standard error.
#   sbatch slurm/evaluate.sh [--config conf/evaluate/PRESET.yaml] [key=value ...]
#SBATCH --job-name=phimr-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
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
# Its presets sample with vLLM. The built-in engine runs in vLLM's environment as well, and in the trainer's.
if [[ -n ${PHIMR_SERVER_PYTHON:-}${PHIMR_SERVER_IMAGE:-} || -x $PHIMR_HOME/.venv-vllm/bin/python ]]; then
  use_server_software
fi
run_plain evaluate "$@"
