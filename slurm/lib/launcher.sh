#!/usr/bin/env bash
# Start a node's command, and pass signals on to the ranks: bash slurm/lib/launcher.sh SCRIPT COMMAND [ARGUMENT ...]
#
# The ranks, processes below this one that run SCRIPT, save when they receive TERM, USR1 or USR2. Where Slurm tracks processes
# by cgroups, it sends a signal only to the first process of a task, which is this one (SignalChildrenProcesses in cgroup.conf is
# `no` by default); otherwise to all processes. A second signal changes nothing. torchrun and a container's runtime would end
# by it: the command begins with these signals ignored.
set -uo pipefail
script=$1
shift

is_below_this() { # PID, of the array `parent`
  local pid=$1
  while [[ -n ${parent[pid]:-} && $pid != "$$" ]]; do pid=${parent[pid]}; done
  [[ $pid == "$$" ]]
}

# shellcheck disable=SC2329  # called by the traps
pass_on() { # SIGNAL
  local parent=() stat fields words pid
  for stat in /proc/[0-9]*/stat; do
    { read -r fields <"$stat"; } 2>/dev/null || continue # the process has ended
    read -r _ pid _ <<<"${fields##*) }"
    parent[${fields%% *}]=$pid
  done
  for pid in "${!parent[@]}"; do
    { mapfile -d '' words <"/proc/$pid/cmdline"; } 2>/dev/null || continue
    if [[ " ${words[*]} " == *" $script "* && " ${words[*]} " != *" torch.distributed.run "* ]] && is_below_this "$pid"; then
      kill "-$1" "$pid" 2>/dev/null
    fi
  done
}

for signal in TERM USR1 USR2; do
  # shellcheck disable=SC2064  # the signal of this round
  trap "pass_on $signal" "$signal"
done
(trap '' TERM USR1 USR2 && exec "$@") <&0 &
command=$!
while true; do # `wait` returns at every trapped signal
  code=0
  wait "$command" || code=$?
  kill -0 "$command" 2>/dev/null || exit "$code"
done
