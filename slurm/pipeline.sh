#!/usr/bin/env bash
# The whole recipe as a chain of jobs, each started when the one before it has succeeded. Run on a login node:
#   slurm/pipeline.sh [key=value ...] [STAGE:key=value ...]
# A plain key=value goes to every stage, one with a stage in front to that stage only:
#   slurm/pipeline.sh run.seed=1 midtrain:optim.lr=2e-5
# DRY_RUN=1 prints the sbatch commands. PHIMR_PRESET chooses the preset of every stage. Every stage's configuration is
# checked before the first job is submitted, and a preset that says how many nodes it takes gets them.
# Ctrl-C on the way takes back what was submitted: a job that has begun saves its state.
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
ARRAYS=(generate verify curate)

is_one_of() {
  local wanted=$1 item
  shift
  for item in "$@"; do [[ $item == "$wanted" ]] && return 0; done
  return 1
}

# The words for one stage of the command line into `arguments`.
arguments_of() {
  local stage=$1 argument key
  shift
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
}

# The nodes that each stage's preset asks for into `nodes`; what a stage would refuse ends this script.
check_stages() {
  local stage python=$PHIMR_HOME/.venv/bin/python
  local -a words=()
  [[ ${PHIMR_CONTAINER_RUNTIME:-none} != none ]] || python=${PHIMR_PYTHON:-$python}
  if [[ -z $(command -v -- "$python") ]]; then
    printf 'not checked: there is no interpreter %q here\n' "$python" >&2
    return 0
  fi
  for stage in "${STAGES[@]}"; do
    arguments_of "$stage" "$@"
    words+=(-- "$stage" --config "conf/$stage/${PHIMR_PRESET:-paper}.yaml" ${arguments[@]+"${arguments[@]}"})
  done
  # The first separator stands before the first stage.
  local told number
  told=$("$python" -m phimr_nemo.jobs.chain "${words[@]:1}") || exit $?
  for stage in "${STAGES[@]}"; do
    read -r number || true
    nodes[$stage]=$number
  done <<<"$told"
  # The trainer's, and those of its rollout servers.
  if [[ -n ${nodes[grpo]} ]]; then nodes[grpo]=$((nodes[grpo] + ${PHIMR_SERVER_NODES:-0})); fi
}

take_back() {
  if [[ ${#jobs[@]} -gt 0 ]]; then scancel "${jobs[@]}" || true; fi
  printf 'interrupted: %s submitted jobs are cancelled; run the same command to continue\n' "${#jobs[@]}" >&2
  exit 3
}

declare -A nodes=()
jobs=() previous=''
arguments_of none "$@"
check_stages "$@"
trap take_back INT TERM
for stage in "${STAGES[@]}"; do
  arguments_of "$stage" "$@"
  # Options of one stage, from the site file: SBATCH_OPTIONS_grpo=(--nodes=8).
  declare -n own_options=SBATCH_OPTIONS_$stage
  command=(sbatch --parsable ${nodes[$stage]:+"--nodes=${nodes[$stage]}"} "${SBATCH_OPTIONS[@]}" "${own_options[@]}")
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
    jobs+=("$previous")
    printf '%-9s job %s\n' "$stage" "$previous"
  fi
done
