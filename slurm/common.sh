# shellcheck shell=bash
# What the stage scripts share. Sourced with PHIMR_HOME set; provides run_plain and run_distributed.
#
#   DRY_RUN=1          check the stage's configuration and whether it fits the job, and print the command instead of
#                      running it (works without Slurm)
#   PHIMR_PRESET       preset of conf/<stage>/ (default: paper); `--config FILE` as the first argument wins
#   PHIMR_SHARDS       tasks that share an array step; needed only when a part of the array is submitted again
# and the settings of slurm/site.env (see site.env.example).
#
# Arguments travel in arrays only: a value with spaces, quotes or $(...) arrives as it was given.

# As a shell reports a process that a signal ended: 128 + its number.
readonly DIED_OF_USR1=138 DIED_OF_TERM=143
# A node's part may end this much later than the first one's: it is writing its share of a checkpoint. After a death
# the other nodes wait in a collective call for ever, and are ended by this.
readonly LAST_NODE_SECONDS=60
# How often Ctrl-C was pressed.
INTERRUPTED=0
# As in phimr_nemo/jobs/server_node.py.
readonly FIRST_SERVER_PORT=8000

fail() {
  printf 'error: %s\n  remedy: %s\n' "$1" "$2" >&2
  exit 2
}

cd -- "$PHIMR_HOME" || fail "cannot enter PHIMR_HOME=$PHIMR_HOME" "submit from the source tree or set PHIMR_HOME"
PHIMR_HOME=$PWD
if [[ -f ${PHIMR_SITE:=slurm/site.env} ]]; then
  # shellcheck source=slurm/site.env.example
  source "$PHIMR_SITE"
fi

is_dry_run() { [[ ${DRY_RUN:-0} == 1 ]]; }

if [[ -z ${SLURM_JOB_ID:-} ]] && ! is_dry_run; then
  fail "this is not inside a Slurm job" "sbatch $0 ...; or DRY_RUN=1 bash $0 ... to see the command"
fi

# The value of this script's own #SBATCH directive, for a dry run outside a job.
directive() {
  local line
  while IFS= read -r line; do
    if [[ $line == "#SBATCH --$1="* ]]; then
      printf '%s' "${line#*=}"
      return
    fi
  done <"$0"
}

node_count() {
  local count=${SLURM_JOB_NUM_NODES:-$(directive nodes)}
  printf '%s' "${count:-1}"
}

# Slurm writes either "8" or "h100:8".
processes_per_node() {
  local count=${PHIMR_PROCS_PER_NODE:-${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}}}
  if [[ -z $count && -z ${SLURM_JOB_ID:-} ]]; then count=$(directive gpus-per-node); fi
  printf '%s' "${count##*:}"
}

rendezvous_host() {
  local -a hosts=()
  if [[ -n ${PHIMR_RDZV_HOST:-} ]]; then
    hosts=("$PHIMR_RDZV_HOST")
  elif [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  else
    hosts=(first-node)
  fi
  [[ -n ${hosts[0]:-} ]] || fail "the first node of ${SLURM_JOB_NODELIST:-} is unknown" "set PHIMR_RDZV_HOST"
  printf '%s' "${hosts[0]}"
}

# prepare_launch NODES TASKS-PER-NODE [OPTION OF SRUN ...]
# LAUNCH: srun and, if the site uses one, the container. PYTHON: the interpreter inside it.
prepare_launch() {
  local nodes=$1 tasks=$2
  shift 2
  LAUNCH=(srun --nodes="$nodes" --ntasks="$((nodes * tasks))" --ntasks-per-node="$tasks"
    --kill-on-bad-exit=0 --wait="$LAST_NODE_SECONDS" "$@")
  PYTHON=${PHIMR_PYTHON:-$PHIMR_HOME/.venv/bin/python}
  local mounts=$PHIMR_HOME:$PHIMR_HOME${PHIMR_CONTAINER_MOUNTS:+,$PHIMR_CONTAINER_MOUNTS}
  case ${PHIMR_CONTAINER_RUNTIME:-none} in
    none)
      if ! is_dry_run && [[ ! -x $PYTHON ]]; then
        fail "there is no interpreter $PYTHON" "make setup, or set PHIMR_PYTHON or PHIMR_CONTAINER_RUNTIME"
      fi
      ;;
    pyxis)
      PYTHON=${PHIMR_PYTHON:-python3}
      LAUNCH+=(--container-image="${PHIMR_CONTAINER_IMAGE:?}" --container-mounts="$mounts"
        --container-workdir="$PHIMR_HOME" --no-container-mount-home)
      ;;
    apptainer)
      PYTHON=${PHIMR_PYTHON:-python3}
      LAUNCH+=(apptainer exec --nv --no-home --bind "$mounts" --pwd "$PHIMR_HOME" "${PHIMR_CONTAINER_IMAGE:?}")
      ;;
    *) fail "PHIMR_CONTAINER_RUNTIME=$PHIMR_CONTAINER_RUNTIME is unknown" "use none, pyxis or apptainer" ;;
  esac
}

# CONFIG and ARGUMENTS from a stage's name and the script's own arguments.
take_arguments() {
  local stage=$1
  shift
  CONFIG=conf/$stage/${PHIMR_PRESET:-paper}.yaml
  if [[ ${1:-} == --config ]]; then
    [[ $# -ge 2 ]] || fail "--config has no value" "give a YAML file after it"
    CONFIG=$2
    shift 2
  fi
  ARGUMENTS=("$@")
  if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    local count
    count=$(shard_count)
    ARGUMENTS+=("shard.index=$SLURM_ARRAY_TASK_ID" "shard.count=$count")
  fi
}

# check_stage STAGE [NODES PROCESSES-PER-NODE]: in a dry run, the stage's own, with the layout and the job compared.
check_stage() {
  is_dry_run || return 0
  local stage=$1 python=$PHIMR_HOME/.venv/bin/python
  [[ ${PHIMR_CONTAINER_RUNTIME:-none} != none ]] || python=${PHIMR_PYTHON:-$python}
  local -a allocation=()
  [[ $# == 1 ]] || allocation=(--allocation "$2x${3:-1}")
  if [[ -z $(command -v -- "$python") ]]; then
    printf 'not checked: there is no interpreter %q here\n' "$python" >&2
    return 0
  fi
  "$python" -m phimr_nemo.cli "$stage" --dry-run ${allocation[@]+"${allocation[@]}"} --config "$CONFIG" "${ARGUMENTS[@]}" |
    sed -n '/^# /p' >&2 || exit "${PIPESTATUS[0]}"
}

# A part of an array that is submitted again must split the work as the whole array did.
shard_count() {
  if [[ -n ${PHIMR_SHARDS:-} ]]; then
    printf '%s' "$PHIMR_SHARDS"
  elif [[ ${SLURM_ARRAY_TASK_MIN:-} == 0 && $((SLURM_ARRAY_TASK_MAX + 1)) == "${SLURM_ARRAY_TASK_COUNT:-}" ]]; then
    printf '%s' "$SLURM_ARRAY_TASK_COUNT"
  else
    fail "the array is not 0-N, so the number of shards is unknown" \
      "PHIMR_SHARDS=<tasks of the whole array> sbatch --array=... $0 ..."
  fi
}

# Run one job step, pass USR1 (sent before the time limit) on to it, and put the job back in the queue if it can go on.
run_step() {
  if is_dry_run; then
    printf '%q ' "$@"
    printf '\n'
    return
  fi
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-}
  [[ -n $SRUN_CPUS_PER_TASK ]] || unset SRUN_CPUS_PER_TASK
  local stopping=0 code=0
  "$@" &
  local step=$!
  trap 'stopping=1; kill -USR1 "$step" || true' USR1
  # From a terminal, in an allocation of salloc: the first is a stop that nothing puts back, the second ends the step.
  trap 'stop_by_hand "$step"' INT
  # A trap ends `wait` early, before the step has ended.
  wait "$step" || code=$?
  while kill -0 "$step" 2>/dev/null; do
    code=0
    wait "$step" || code=$?
  done
  if [[ $INTERRUPTED == 0 ]]; then continue_later "$code" "$stopping"; fi
  return "$code"
}

# stop_by_hand STEP
stop_by_hand() {
  if [[ $((INTERRUPTED++)) == 0 ]]; then kill -USR1 "$1"; else kill -KILL "$1"; fi 2>/dev/null || true
}

# Requeue a job whose step has saved its state or was stopped: a preempted job that leaves within its grace time is
# over for Slurm, and a dead process is nothing that Slurm would start again. `scancel` ends this shell, so that
# nothing comes back that was cancelled.
continue_later() {
  local code=$1 stopping=$2 restarts=${SLURM_RESTART_COUNT:-0} job=$SLURM_JOB_ID
  # The id of an array's last task is that of the whole array.
  if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  case $code in
    0 | 2) return 0 ;;                      # done; the user's mistake
    3 | "$DIED_OF_USR1" | "$DIED_OF_TERM") stopping=1 ;;
  esac
  if [[ $stopping == 1 ]]; then
    if [[ $restarts -ge ${PHIMR_MAX_RESTARTS:=100} ]]; then
      fail "the job was restarted $PHIMR_MAX_RESTARTS times" "ask for more time, or raise PHIMR_MAX_RESTARTS"
    fi
    echo "stopped (exit code $code): requeueing job $job"
  elif count_failure "$job" "${PHIMR_FAILURE_RESTARTS:-2}"; then
    echo "failed (exit code $code): requeueing job $job"
  else
    return 0
  fi
  scontrol requeue "$job"
}

# count_failure JOB LIMIT: whether the job has failed at most LIMIT times, this time included. The number stands at the
# end of the job's comment, because Slurm's own count of restarts has the preemptions in it as well.
count_failure() {
  local job=$1 limit=$2 comment failures=0
  comment=$(scontrol show job "$job" | sed -n 's/^ *Comment=//p')
  if [[ $comment =~ ^(.*[[:space:]])?phimr-failures=([0-9]+)$ ]]; then
    comment=${BASH_REMATCH[1]%" "} failures=${BASH_REMATCH[2]}
  fi
  if [[ $failures -ge $limit ]]; then return 1; fi
  scontrol update "JobId=$job" "Comment=${comment:+$comment }phimr-failures=$((failures + 1))"
}

# run_plain STAGE [ARGUMENT ...]: one process on one node.
run_plain() {
  local stage=$1
  take_arguments "$@"
  check_stage "$stage"
  prepare_launch 1 1
  run_step "${LAUNCH[@]}" "$PYTHON" -m phimr_nemo.cli "$stage" --config "$CONFIG" "${ARGUMENTS[@]}"
}

# run_distributed STAGE [ARGUMENT ...]: torchrun on every node, meeting on the first.
run_distributed() {
  take_arguments "$@"
  check_stage "$1" "$(node_count)" "$(processes_per_node)"
  torchrun_on "$1" "$(node_count)" "$(rendezvous_host)"
}

# torchrun_on STAGE NODES HOST [OPTION OF SRUN ...]
torchrun_on() {
  local stage=$1 nodes=$2 host=$3 processes
  local job=${SLURM_JOB_ID:-0}
  shift 3
  processes=$(processes_per_node)
  prepare_launch "$nodes" 1 "$@"
  # The port follows from the job, so that two jobs on one node do not meet.
  run_step "${LAUNCH[@]}" "$PYTHON" -m phimr_nemo.jobs.node \
    --nnodes "$nodes" --nproc-per-node "${processes:-1}" \
    --rdzv-backend c10d --rdzv-endpoint "$host:$((20000 + job % 10000))" \
    --rdzv-id "$job-${SLURM_RESTART_COUNT:-0}" --max-restarts 0 \
    -m phimr_nemo.cli "$stage" --config "$CONFIG" "${ARGUMENTS[@]}"
}

# run_with_servers STAGE [ARGUMENT ...]: as run_distributed, with rollout servers on the last PHIMR_SERVER_NODES nodes
# of the allocation, on those of the second component of a heterogeneous job, or with PHIMR_COLOCATED=1 on the trainer's.
run_with_servers() {
  local stage=$1 url_list
  local -a hosts=() servers=() urls=() trainer_options=() server_options=()
  take_arguments "$@"
  if [[ ${PHIMR_COLOCATED:-0} == 1 ]]; then
    [[ ${SLURM_HET_SIZE:-1} == 1 && ${PHIMR_SERVER_NODES:-0} == 0 ]] ||
      fail "PHIMR_COLOCATED=1 with nodes for servers" "PHIMR_SERVER_NODES=0, and one component"
    all_hosts
    # Its step takes nothing from the trainer's: both have all GPUs.
    servers=("${hosts[@]}") server_options=(--overlap)
    ARGUMENTS+=(engine.colocated=true)
  elif [[ ${SLURM_HET_SIZE:-1} == 2 ]]; then
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0")
    mapfile -t servers < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1")
    trainer_options=(--het-group=0) server_options=(--het-group=1)
  elif [[ ${PHIMR_SERVER_NODES:-0} == 0 ]]; then
    run_distributed "$@"
    return
  else
    all_hosts
    local trainers=$((${#hosts[@]} - PHIMR_SERVER_NODES))
    [[ $trainers -ge 1 ]] || fail "PHIMR_SERVER_NODES=$PHIMR_SERVER_NODES leaves no trainer of ${#hosts[@]} nodes" \
      "sbatch --nodes=<trainers + servers> $0 ..."
    servers=("${hosts[@]:trainers}") hosts=("${hosts[@]:0:trainers}")
    trainer_options=(--nodelist="$(joined "${hosts[@]}")") server_options=(--nodelist="$(joined "${servers[@]}")")
  fi
  local count=${PHIMR_SERVERS_PER_NODE:-$(processes_per_node)} server number
  for server in "${servers[@]}"; do
    for ((number = 0; number < ${count:-1}; number++)); do urls+=("http://$server:$((FIRST_SERVER_PORT + number))"); done
  done
  url_list=$(joined "${urls[@]}")
  # The configuration says which kind of servers.
  ARGUMENTS+=("engine.base_urls=[$url_list]" engine.api_key_env=PHIMR_KEY)
  check_stage "$stage" "${#hosts[@]}" "$(processes_per_node)"
  start_servers "$stage" "${#servers[@]}" "${count:-1}" "${server_options[@]}"
  torchrun_on "$stage" "${#hosts[@]}" "${PHIMR_RDZV_HOST:-${hosts[0]}}" "${trainer_options[@]}"
}

joined() { local IFS=,; printf '%s' "$*"; }

# The allocation's nodes into `hosts`; made-up ones in a dry run outside a job.
all_hosts() {
  local number count
  if [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  else
    count=$(node_count)
    for ((number = 1; number <= count; number++)); do hosts+=("node-$number"); done
  fi
}

# The software that has vLLM (or TensorRT-LLM) instead of the trainer's, for what prepare_launch starts next.
use_server_software() {
  local python=$PHIMR_HOME/.venv-vllm/bin/python
  [[ ${PHIMR_CONTAINER_RUNTIME:-none} == none ]] || python=python3
  PHIMR_PYTHON=${PHIMR_SERVER_PYTHON:-$python}
  PHIMR_CONTAINER_IMAGE=${PHIMR_SERVER_IMAGE:-${PHIMR_CONTAINER_IMAGE:-}}
}

# start_servers STAGE NODES SERVERS-PER-NODE [OPTION OF SRUN ...]: in the background; they end with this script.
start_servers() {
  local stage=$1 nodes=$2 count=$3
  shift 3
  # A key for this start of this job: whoever reaches a server without it is refused.
  PHIMR_KEY=${PHIMR_KEY:-$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')}
  export PHIMR_KEY
  if [[ $count -gt 1 && ${PHIMR_COLOCATED:-0} == 0 ]]; then set -- --gpus-per-task=1 "$@"; fi
  local PHIMR_PYTHON=${PHIMR_PYTHON:-} PHIMR_CONTAINER_IMAGE=${PHIMR_CONTAINER_IMAGE:-}
  use_server_software
  prepare_launch "$nodes" "$count" "$@"
  local -a command=("${LAUNCH[@]}" "$PYTHON" -m phimr_nemo.jobs.server_node --stage "$stage" --servers "$count"
    --config "$CONFIG" "${ARGUMENTS[@]}")
  if is_dry_run; then
    printf '%q ' "${command[@]}"
    printf '\n'
    return
  fi
  "${command[@]}" &
  SERVERS=$!
  trap 'kill -TERM "$SERVERS" 2>/dev/null || true' EXIT
}
