#!/usr/bin/env bash
# One node's launcher: task.sh COMMAND... runs torchrun and passes USR1 to its workers only.
# torchrun itself would die of USR1, or end its workers 30 s after a signal that it handles; a checkpoint of a
# large model may take longer. The workers save, leave, and torchrun ends with them.
set -uo pipefail

(
  trap '' USR1
  exec "$@"
) &
launcher=$!

# shellcheck disable=SC2329  # called by the trap
tell_workers() {
  local -a workers=()
  # The kernel's list ends without a newline, which makes `read` fail although it has read.
  read -ra workers <"/proc/$launcher/task/$launcher/children" || true
  if [[ ${#workers[@]} -gt 0 ]]; then kill -USR1 "${workers[@]}"; fi
}
trap tell_workers USR1
trap 'kill -TERM "$launcher"' TERM

# A trap ends `wait` early, before the launcher has ended.
code=0
wait "$launcher" || code=$?
while kill -0 "$launcher" 2>/dev/null; do
  code=0
  wait "$launcher" || code=$?
done
exit "$code"
