#!/usr/bin/env bash
# Distil on a Slurm cluster: one launcher per node, one process per GPU, any number of nodes.
#
#   sbatch slurm/distill_xlmr.sh                                       XLM-R-large -> 12 x 384 (the default recipe)
#   sbatch --nodes 4 slurm/distill_xlmr.sh recipes/xlmr_large_l6_h384.yaml
#   sbatch slurm/distill_xlmr.sh RECIPE DS_JSON RUN_DIR [further arguments of pipeline/train.py]
#
# Slurm sends USR1 before the time limit. The run then saves and writes the marker file PREEMPTED, and this script requeues
# the job, which resumes. With the marker file DONE the job ends; submitted again with more steps, it continues. A run that
# fails is not requeued. Environment: MAX_RESTARTS, PROCESSES_PER_NODE, ON_PREEMPTION=requeue|end, SITE_ENV (default
# slurm/site.env), ALLOW_CPU_RANKS=1 (train on CPUs although the job has GPUs). Documentation: docs/slurm.md
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
RESIGNAL_S=20 # a rank that is still importing libraries ignores a signal, so the signal is repeated
ANSWER_S=90   # a node that has not started `true` by then is dead

read_arguments() {
  recipe=${1:-recipes/xlmr_large_l12_h384.yaml}
  ds_json=${2:-ds_configs/zero2.json}
  run_dir=${3:-runs/$(basename "$recipe" .yaml)}
  train_arguments=("${@:4}")
  max_restarts=${MAX_RESTARTS:-1000}
  on_preemption=${ON_PREEMPTION:-requeue}
  attempt=${SLURM_RESTART_COUNT:-0}
  need_path RECIPE "$recipe" "Recipes here: $(echo recipes/*.yaml)"
  need_path DS_JSON "$ds_json" "DeepSpeed configurations here: $(echo ds_configs/*.json)"
  need_number MAX_RESTARTS "$max_restarts" 0
  [[ $on_preemption == requeue || $on_preemption == end ]] || fail "ON_PREEMPTION is '$on_preemption'; it must be requeue or end"
  processes=$(processes_per_node)
}

# Ends this job where an earlier one has finished the run, or after too many restarts. Where the job asks a finished run for
# more steps or other settings, training decides whether to continue.
check_earlier_attempts() {
  local code=0 answer
  if [[ -f $run_dir/DONE ]]; then
    answer=$(on_node slurm/lib/is_finished.py "$recipe" "$run_dir" "${train_arguments[@]}") || code=$?
    if [[ $answer == finished ]]; then
      note "$run_dir is finished: $(<"$run_dir/DONE")"
      exit 0
    fi
    ((code != 2)) || fail "the recipe of this job cannot be read (see above)"
    note "$run_dir is finished ($(<"$run_dir/DONE")), and this job asks for more steps or other settings: training decides"
  fi
  done_before=$(mark_of "$run_dir/DONE") preempted_before=$(mark_of "$run_dir/PREEMPTED")
  if ((attempt > max_restarts)); then
    fail "this is restart $attempt of job $SLURM_JOB_ID, and MAX_RESTARTS is $max_restarts. If the run is healthy, submit it" \
      "again: it resumes from the newest checkpoint in $run_dir"
  fi
}

# Identity of a file; empty where there is none. Distinguishes a marker file of this attempt from an earlier one.
mark_of() {
  stat --format='%i %y' "$1" 2>/dev/null || true
}

announce() {
  cat <<TXT
[$(date '+%F %T')] job $SLURM_JOB_ID, attempt $attempt: $recipe with $ds_json
  runs:   $processes process(es) on each of ${SLURM_JOB_NUM_NODES:-1} node(s): $SLURM_JOB_NODELIST
  output: $run_dir
  logs:   tail -F $logs-*.log
  curves: tensorboard --logdir $(dirname "$run_dir")
  to save and end (submit again to resume):  touch $run_dir/STOP
  to save, requeue and resume:               scancel --signal=USR1 --batch $SLURM_JOB_ID
  to end, saving if time allows:             scancel $SLURM_JOB_ID
TXT
}

# `wait` returns at every trapped signal, so it is repeated until the step has ended.
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
    note "Slurm is giving this job's nodes to another job; the steps after the newest checkpoint are lost"
  elif nodes_answer; then
    report_failure "$code"
    exit 1
  else
    note "not all nodes respond; the steps after the newest checkpoint are lost"
  fi
  if [[ -e $run_dir/STOP && $on_preemption == end ]]; then
    fail "$run_dir/STOP ends this job, and with it the jobs of its chain"
  elif [[ -n $cancelled ]]; then
    note "job $SLURM_JOB_ID was cancelled or preempted; it resumes if Slurm requeues it, or in the next job"
  elif [[ -e $run_dir/STOP || $on_preemption == end ]]; then
    note "job $SLURM_JOB_ID ends; the next job with this run directory resumes"
  elif ((attempt >= max_restarts)); then
    fail "job $SLURM_JOB_ID was restarted $attempt times, and MAX_RESTARTS is $max_restarts: not requeued. Submit it" \
      "again to resume from the newest checkpoint"
  else
    requeue
  fi
}

# Requeueing sends TERM to this script and to scontrol, which must get its answer first.
requeue() {
  trap '' TERM
  if scontrol requeue "$SLURM_JOB_ID"; then
    note "requeued as attempt $((attempt + 1))"
  else
    fail "this cluster does not requeue; submit again to resume, or queue a chain of jobs: submit_all.sh --chain N"
  fi
}

# Slurm's own preemption sends TERM to the ranks. Before their process group exists they have nothing to save: they end
# immediately without a marker file, in the job's grace time. That is not a failure. Slurm sets PreemptTime when it decides.
is_being_preempted() {
  scontrol --oneliner show job "$SLURM_JOB_ID" | grep -qE '(^| )PreemptTime=[0-9]'
}

# Slurm requeues the job when it finds that a node is dead, but the ranks may find it minutes earlier.
nodes_answer() {
  timeout --kill-after=10 "$ANSWER_S" srun --overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 \
    true &>/dev/null
}

report_failure() {
  local code=$1 log cause
  for log in "$logs"-*.log; do
    printf '\n---- the end of %s\n' "$log"
    # After torchrun's "failed (exitcode ...)" comes only its own traceback.
    sed '/elastic.*failed (exitcode/q' "$log" | tail -n 25 || true
  done
  cause=$(likely_cause)
  # Where another job trains the run, the run has not failed.
  [[ $cause == *' is in use by '* ]] || printf '%s\n' "$cause" >"$run_dir/FAILED"
  printf '\nerror: job %s failed (code %s) and is not requeued. Cause according to the logs:\n%s\n' \
    "$SLURM_JOB_ID" "$code" "$cause"
}

# Last lines of tracebacks and error messages, without those of ranks that only lost their connection to another rank. A
# killed rank (-9: often out of memory) has no line in the logs.
likely_cause() {
  local own='^(\[rank[0-9]+\]: )?(([A-Za-z_0-9]+\.)*[A-Za-z_0-9]*(Error|Exception|Interrupt)(:|$)|error:|slurmstepd: error:)'
  local secondary='Connection (closed|reset)|gloo|NCCL|ProcessGroup|Broken pipe|DistNetworkError|ChildFailedError'
  local said killed cause
  said=$(grep -hE "$own" "$logs"-*.log | grep -v ChildFailedError | sort -u) || true
  killed=$(grep -hoE 'failed \(exitcode: -[0-9]+\) local_rank: [0-9]+' "$logs"-*.log | sort -u) || true
  cause=$(grep -vE "$secondary" <<<"$said") || cause=$killed
  head -n 3 <<<"${cause:-${said:-the logs in $run_dir/logs give no reason}}"
}

enter_repository
read_arguments "$@"
name_job distill-xlmr "$(basename "$run_dir")-train"
check_earlier_attempts
mkdir -p "$run_dir/logs"
logs=$run_dir/logs/job$SLURM_JOB_ID-attempt$attempt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK > processes ? SLURM_CPUS_PER_TASK / processes : 1))}
step='' repeater='' asked='' cancelled=''
trap 'ask_to_save USR1' USR1
trap 'ask_to_save TERM' TERM
announce
code=0
train || code=$?
report_and_end "$code"
