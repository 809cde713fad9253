#!/usr/bin/env bash
# The whole recipe as a chain of jobs, each started when the one before it has succeeded. Run on a login node:
#   slurm/pipeline.sh [key=value ...] [STAGE:key=value ...]
# A plain key=value goes to every stage, one with a stage in front to that stage only:
#   slurm/pipeline.sh run.seed=1 midtrain:optim.lr=2e-5
# DRY_RUN=1 prints the sbatch commands. PHIMR_PRESET chooses the preset of every stage.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export PHIMR_HOME=$PWD

SBATCH_OPTIONS=()
if [[ -f ${PHIMR_SITE:=slurm/site.env} ]]; then
  # shellcheck source=slurm/site.env.example
  source "$PHIMR_SITE"
fi

STAGES=(generate verify curate pack midtrain sft dpo grpo evaluate export)
# Singleton would run an array's tasks one after the other.
ARRAYS=(generate verify)

is_one_of() {
  local wanted=$1 item
  shift
  for item in "$@"; do [[ $item == "$wanted" ]] && return 0; done
  return 1
}

previous=''
for stage in "${STAGES[@]}"; do
  arguments=()
  for argument in "$@"; do
    key=${argument%%=*}
    if [[ $key == *:* ]] && is_one_of "${key%%:*}" "${STAGES[@]}"; then
      if [[ ${key%%:*} == "$stage" ]]; then arguments+=("${argument#*:}"); fi
    elif [[ $key == *:* ]]; then
      printf 'error: %q names no stage\n  remedy: use one of: %s\n' "$argument" "${STAGES[*]}" >&2
      exit 2
    else
      arguments+=("$argument")
    fi
  done
  # Options of one stage, from the site file: SBATCH_OPTIONS_grpo=(--nodes=8).
  declare -n own_options=SBATCH_OPTIONS_$stage
  command=(sbatch --parsable "${SBATCH_OPTIONS[@]}" "${own_options[@]}")
  if [[ -n $previous ]]; then
    dependency=afterok:$previous
    # On the command line this replaces the script's own dependency, hence "singleton" again.
    is_one_of "$stage" "${ARRAYS[@]}" || dependency+=,singleton
    command+=(--dependency="$dependency" --kill-on-invalid-dep=yes)
  fi
  command+=("slurm/$stage.sh" "${arguments[@]}")
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${command[@]}"
    printf '\n'
    previous="<$stage>"
  else
    submitted=$("${command[@]}")
    # On a federation sbatch answers "id;cluster".
    previous=${submitted%%;*}
    printf '%-9s job %s\n' "$stage" "$previous"
  fi
done
