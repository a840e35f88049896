#!/usr/bin/env bash
# Distil on a Slurm cluster: one launcher per node, one process per GPU, any number of nodes.
#
#   sbatch slurm/distill_xlmr.sh                                       XLM-R-large -> 12 x 384 (the default recipe)
#   sbatch --nodes 4 slurm/distill_xlmr.sh recipes/xlmr_large_l6_h384.yaml
#   sbatch slurm/distill_xlmr.sh RECIPE DS_JSON RUN_DIR [further arguments of pipeline/train.py]
#
# Before the time limit Slurm sends USR1; the run saves, leaves the marker PREEMPTED, and this script requeues the job,
# which then resumes. Marker DONE ends it; submitted again with more steps it continues. A run that fails by itself is not
# requeued. Environment: MAX_RESTARTS, PROCESSES_PER_NODE, ON_PREEMPTION=requeue|end, SITE_ENV (default slurm/site.env),
# ALLOW_CPU_RANKS=1 (train on CPUs although the job has GPUs). All of it: docs/slurm.md
#SBATCH --job-name=distill-xlmr
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=distill-%j.log
set -euo pipefail

# shellcheck source=slurm/lib/job.sh
source "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}/slurm/lib/job.sh"
RESIGNAL_S=20 # a rank that is still importing libraries does not hear a signal yet, so it is repeated
ANSWER_S=90   # a node that has not started `true` after so long is dead

read_arguments() {
  recipe=${1:-recipes/xlmr_large_l12_h384.yaml}
  ds_json=${2:-ds_configs/zero2.json}
  run_dir=${3:-runs/$(basename "$recipe" .yaml)}
  train_arguments=("${@:4}")
  max_restarts=${MAX_RESTARTS:-1000}
  on_preemption=${ON_PREEMPTION:-requeue}
  life=${SLURM_RESTART_COUNT:-0}
  need_path RECIPE "$recipe" "Recipes here: $(echo recipes/*.yaml)"
  need_path DS_JSON "$ds_json" "DeepSpeed configurations here: $(echo ds_configs/*.json)"
  need_number MAX_RESTARTS "$max_restarts" 0
  [[ $on_preemption == requeue || $on_preemption == end ]] || fail "ON_PREEMPTION is '$on_preemption'; requeue or end"
  processes=$(processes_per_node)
}

# What an earlier attempt or job says about this one. A finished run that is asked for more steps, or for something else, is
# training's to continue or to reject.
refuse_to_loop() {
  local code=0 answer
  if [[ -f $run_dir/DONE ]]; then
    answer=$(on_node slurm/lib/is_finished.py "$recipe" "$run_dir" "${train_arguments[@]}") || code=$?
    if [[ $answer == finished ]]; then
      note "$run_dir is finished: $(<"$run_dir/DONE")"
      exit 0
    fi
    ((code != 2)) || fail "the recipe of this job cannot be read (see above)"
    note "$run_dir has ended before ($(<"$run_dir/DONE")), and this job asks for something else: training decides"
  fi
  done_before=$(mark_of "$run_dir/DONE") preempted_before=$(mark_of "$run_dir/PREEMPTED")
  if ((life > max_restarts)); then
    fail "this is restart $life of job $SLURM_JOB_ID, and MAX_RESTARTS is $max_restarts. If all is well, submit it anew:" \
      "it goes on from the newest checkpoint in $run_dir"
  fi
}

# Which file this is; empty if there is none. Tells a marker of this attempt from one that was there before.
mark_of() {
  stat --format='%i %y' "$1" 2>/dev/null || true
}

announce() {
  cat <<TXT
[$(date '+%F %T')] job $SLURM_JOB_ID, life $life: $recipe with $ds_json
  runs:   $processes process(es) on each of ${SLURM_JOB_NUM_NODES:-1} node(s): $SLURM_JOB_NODELIST
  into:   $run_dir
  logs:   tail -F $logs-*.log
  curves: tensorboard --logdir $(dirname "$run_dir")
  to save and end (submit again to go on):   touch $run_dir/STOP
  to save, requeue and go on:                scancel --signal=USR1 --batch $SLURM_JOB_ID
  to end, saving if time allows:             scancel $SLURM_JOB_ID
TXT
}

# `wait` comes back at every trapped signal, so it is asked until the step is really gone.
train() {
  start_ranks "$logs" "$processes" pipeline/train.py --deepspeed "$ds_json" --recipe "$recipe" --run-dir "$run_dir" \
    "${train_arguments[@]}" &
  step=$!
  [[ -z $asked ]] || repeat_signal
  local code=0
  while true; do
    code=0
    wait "$step" || code=$?
    kill -0 "$step" 2>/dev/null || break
  done
  [[ -z $repeater ]] || kill "$repeater" 2>/dev/null || true
  return "$code"
}

# shellcheck disable=SC2329  # called by the traps
ask_to_save() {
  note "$1 received: asking all ranks to save"
  asked=yes
  [[ $1 != TERM ]] || cancelled=yes
  [[ -z $step || -n $repeater ]] || repeat_signal
}

repeat_signal() {
  (while kill -USR1 "$step" 2>/dev/null; do sleep "$RESIGNAL_S"; done) &
  repeater=$!
}

report_and_end() {
  local code=$1
  if [[ -f $run_dir/DONE ]] && { ((code == 0)) || [[ $(mark_of "$run_dir/DONE") != "$done_before" ]]; }; then
    note "$(<"$run_dir/DONE")"
    exit 0
  elif [[ -f $run_dir/PREEMPTED && $(mark_of "$run_dir/PREEMPTED") != "$preempted_before" ]]; then
    note "$(<"$run_dir/PREEMPTED")"
  elif is_being_preempted; then
    note "Slurm is giving this job's nodes to another job; what is lost is what came after the newest checkpoint"
  elif nodes_answer; then
    report_failure "$code"
    exit 1
  else
    note "not all nodes answer any more; what is lost is what came after the newest checkpoint"
  fi
  if [[ -e $run_dir/STOP && $on_preemption == end ]]; then
    fail "$run_dir/STOP ends this job and, so that none goes on, the chain behind it"
  elif [[ -n $cancelled ]]; then
    note "job $SLURM_JOB_ID was ended from outside; if Slurm requeues it, or with the next job, it goes on"
  elif [[ -e $run_dir/STOP || $on_preemption == end ]]; then
    note "job $SLURM_JOB_ID ends here; the next job with this run directory goes on"
  elif ((life >= max_restarts)); then
    fail "job $SLURM_JOB_ID was restarted $life times, and MAX_RESTARTS is $max_restarts: not requeued. Submit it" \
      "again to go on from the newest checkpoint"
  else
    requeue
  fi
}

# Requeueing ends this script with TERM, and would end scontrol with it before it has its answer.
requeue() {
  trap '' TERM
  if scontrol requeue "$SLURM_JOB_ID"; then
    note "requeued as life $((life + 1))"
  else
    fail "this cluster does not requeue; submit again to go on, or let submit_all.sh --chain N queue several jobs that" \
      "follow each other"
  fi
}

# Slurm's own preemption sends TERM to the ranks. Before they have met they have nothing to save and end at once, without a
# marker, while the job still has its grace time: that is no failure. PreemptTime is set from the decision on.
is_being_preempted() {
  scontrol --oneliner show job "$SLURM_JOB_ID" | grep -qE '(^| )PreemptTime=[0-9]'
}

# Slurm requeues by itself when it has noticed that a node is dead, but the ranks may notice minutes earlier.
nodes_answer() {
  timeout --kill-after=10 "$ANSWER_S" srun --overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 \
    true &>/dev/null
}

report_failure() {
  local code=$1 log cause
  for log in "$logs"-*.log; do
    printf '\n---- the end of %s\n' "$log"
    # Below torchrun's "failed (exitcode ...)" stands only its own traceback.
    sed '/elastic.*failed (exitcode/q' "$log" | tail -n 25 || true
  done
  cause=$(likely_cause)
  # A run that another job is training has not failed.
  [[ $cause == *' is in use by '* ]] || printf '%s\n' "$cause" >"$run_dir/FAILED"
  printf '\nerror: job %s failed (code %s) and is not requeued. Cause, as the logs tell it:\n%s\n' \
    "$SLURM_JOB_ID" "$code" "$cause"
}

# Last lines of tracebacks and error messages, without those of ranks that only lost a neighbour; a rank that was killed
# (-9: often for memory) left no line of its own.
likely_cause() {
  local own='^(\[rank[0-9]+\]: )?(([A-Za-z_0-9]+\.)*[A-Za-z_0-9]*(Error|Exception|Interrupt)(:|$)|error:|slurmstepd: error:)'
  local echoes='Connection (closed|reset)|gloo|NCCL|ProcessGroup|Broken pipe|DistNetworkError|ChildFailedError'
  local said killed cause
  said=$(grep -hE "$own" "$logs"-*.log | grep -v ChildFailedError | sort -u) || true
  killed=$(grep -hoE 'failed \(exitcode: -[0-9]+\) local_rank: [0-9]+' "$logs"-*.log | sort -u) || true
  cause=$(grep -vE "$echoes" <<<"$said") || cause=$killed
  head -n 3 <<<"${cause:-${said:-the logs in $run_dir/logs give no reason}}"
}

enter_repository
read_arguments "$@"
name_job distill-xlmr "$(basename "$run_dir")-train"
refuse_to_loop
mkdir -p "$run_dir/logs"
logs=$run_dir/logs/job$SLURM_JOB_ID-life$life
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK > processes ? SLURM_CPUS_PER_TASK / processes : 1))}
step='' repeater='' asked='' cancelled=''
trap 'ask_to_save USR1' USR1
trap 'ask_to_save TERM' TERM
announce
code=0
train || code=$?
report_and_end "$code"
