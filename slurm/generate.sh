#!/usr/bin/env bash
# Problems -> rollouts; the tasks of the array take shard after shard, whoever is free the next one.
#   sbatch slurm/generate.sh [--config conf/generate/PRESET.yaml] [key=value ...]
# The paper's preset asks servers that run elsewhere and needs no GPU. A teacher in the process (conf/generate/vllm.yaml):
#   sbatch --gpus-per-node=8 slurm/generate.sh --config conf/generate/vllm.yaml teacher.engine.tensor=8 ...
#SBATCH --job-name=phimr-generate
#SBATCH --array=0-15
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=32G
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%A_%a.log
set -euo pipefail

# sbatch runs a copy of this script, so its own place says nothing inside a job.
PHIMR_HOME=${PHIMR_HOME:-${SLURM_SUBMIT_DIR:-$(dirname -- "${BASH_SOURCE[0]}")/..}}
# shellcheck source=slurm/common.sh
source "$PHIMR_HOME/slurm/common.sh"
run_plain generate "$@"
