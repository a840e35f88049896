#!/usr/bin/env bash
# Queue the whole way from text to an evaluated student: prepare (array) -> merge -> train -> evaluate.
#
#   slurm/submit_all.sh --text /data/cc100 --tokenizer /models/xlm-roberta-large --shards data/cc100_shards \
#     --recipe recipes/xlmr_large_l12_h384.yaml --nodes 4 [--dry-run] [-- arguments of pipeline/train.py]
#   slurm/submit_all.sh --from train --recipe recipes/xlmr_large_l12_h384.yaml     what comes before is there already
#   slurm/submit_all.sh --status runs/xlmr_large_l12_h384                          how far it is, and what went wrong
#
# Options: --run-dir DIR, --ds JSON, --languages "de en sw", --at-once N (array tasks, default 20), --evaluate "ARGUMENTS",
# --chain N: for clusters that forbid requeueing, N training jobs that follow each other instead of one that requeues.
# Each stage starts when the one before has succeeded; when that fails, Slurm cancels the rest. sbatch options per stage
# stand in the site's settings. Job numbers are recorded in RUN_DIR/jobs.tsv.
set -euo pipefail
cd "$(dirname "$0")/.."
export SLURM_SUBMIT_DIR=$PWD
# shellcheck source=slurm/lib/job.sh
source slurm/lib/job.sh
# shellcheck source=slurm/lib/stages.sh
source slurm/lib/stages.sh
STAGES=(prepare merge train evaluate)

read_arguments() {
  text='' tokenizer='' shards='' recipe='' run_dir='' ds_json=ds_configs/zero2.json nodes=1 first=prepare at_once=20
  languages=() evaluate_arguments=() train_arguments=() chain=0 dry_run='' status=''
  while (($#)); do
    case $1 in
      --dry-run) dry_run=yes && shift && continue ;;
      --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;;
      --) shift && train_arguments=("$@") && break ;;
    esac
    (($# >= 2)) || fail "$1 needs a value, or is no option of this script (see --help)"
    case $1 in
      --text) text=$2 ;;
      --tokenizer) tokenizer=$2 ;;
      --shards) shards=$2 ;;
      --recipe) recipe=$2 ;;
      --run-dir) run_dir=$2 ;;
      --ds) ds_json=$2 ;;
      --nodes) nodes=$2 ;;
      --from) first=$2 ;;
      --at-once) at_once=$2 ;;
      --chain) chain=$2 ;;
      --status) status=$2 ;;
      --languages) read -ra languages <<<"$2" ;;
      --evaluate) read -ra evaluate_arguments <<<"$2" ;;
      *) fail "unknown option $1 (see --help)" ;;
    esac
    shift 2
  done
}

check_arguments() {
  [[ " ${STAGES[*]} " == *" $first "* ]] || fail "--from is '$first'; it must be one of: ${STAGES[*]}"
  [[ -n $recipe ]] || fail "--recipe is missing. Recipes here: $(echo recipes/*.yaml)"
  need_path --recipe "$recipe" "Recipes here: $(echo recipes/*.yaml)"
  need_path --ds "$ds_json" "DeepSpeed configurations here: $(echo ds_configs/*.json)"
  need_number --nodes "$nodes" 1
  need_number --at-once "$at_once" 1
  need_number --chain "$chain" 0
  run_dir=${run_dir:-runs/$(basename "$recipe" .yaml)}
  if [[ $first == prepare ]]; then
    need_path --text "${text:-(not given)}" "It is the directory of en.txt.xz, de.txt.xz, ..."
    need_path --tokenizer "${tokenizer:-(not given)}" "It is a SentencePiece model, or a directory with one"
    ((${#languages[@]})) || mapfile -t languages < <(languages_of "$text")
    ((${#languages[@]})) || fail "--text: $text holds no files like en.txt.xz"
  fi
  if [[ $first == prepare || $first == merge ]]; then
    [[ -n $shards ]] || fail "--shards is missing: the directory that the recipe calls \`data\`"
  fi
}

# submit STAGE DEPENDENCY SBATCH_ARGUMENT ...: sets `job` to the new job's number, records it.
submit() {
  local stage=$1 dependency=$2
  shift 2
  local command=(sbatch --parsable --kill-on-invalid-dep=yes ${dependency:+"--dependency=$dependency"} "$@")
  if [[ -n $dry_run ]]; then
    job="<$stage>"
    echo "${command[*]@Q}"
    return
  fi
  job=$("${command[@]}") || fail "sbatch refused the $stage job (its reason stands above). Jobs queued so far: $run_dir/jobs.tsv"
  job=${job%%;*}
  jobs+=("$job")
  printf '%s\t%s\t%(%F %T)T\n' "$stage" "$job" -1 >>"$run_dir/jobs.tsv"
  note "$stage: job $job${dependency:+, after $dependency}"
}

submit_stages() {
  local logs=$run_dir/logs before='' link
  job='' jobs=()
  [[ -n $dry_run ]] || mkdir -p "$logs"
  if [[ $first == prepare ]]; then
    submit prepare '' "--array=0-$((${#languages[@]} - 1))%$at_once" "--output=$logs/prepare-%A_%a.log" \
      "${PREPARE_SBATCH[@]}" slurm/prepare_cc100.sh "$text" "$tokenizer" "$shards" "${languages[@]}"
    before=afterok:$job
  fi
  if [[ $first == prepare || $first == merge ]]; then
    submit merge "$before" "--output=$logs/merge-%j.log" "${MERGE_SBATCH[@]}" \
      slurm/merge_shards.sh "$shards" "${languages[@]}"
    before=afterok:$job
  fi
  if [[ $first != evaluate ]]; then
    for ((link = 1; link <= (chain ? chain : 1); link++)); do
      submit train "$before" "--nodes=$nodes" "--output=$logs/train-%j.log" "${CHAIN_OPTIONS[@]}" "${TRAIN_SBATCH[@]}" \
        slurm/distill_xlmr.sh "$recipe" "$ds_json" "$run_dir" "${train_arguments[@]}"
      before=afterok:$job
    done
  fi
  submit evaluate "$before" "--output=$logs/evaluate-%j.log" "${EVALUATE_SBATCH[@]}" \
    slurm/evaluate.sh "$run_dir" "${evaluate_arguments[@]}"
}

# -- status

show_status() {
  local stage number at state
  need_path --status "$run_dir/jobs.tsv" "It is the --run-dir of an earlier slurm/submit_all.sh"
  while IFS=$'\t' read -r stage number at; do
    state=$(state_of "$number")
    printf '%-9s job %-8s queued %s  %s\n' "$stage" "$number" "$at" "$state"
    if [[ $state == *FAILED* || $state == *CANCELLED* || $state == *TIMEOUT* ]]; then explain "$stage" "$number"; fi
  done <"$run_dir/jobs.tsv"
  local marker
  for marker in DONE PREEMPTED FAILED; do
    if [[ -f $run_dir/$marker ]]; then echo "training: $marker: $(<"$run_dir/$marker")"; fi
  done
}

# All states of a job or of an array's tasks; accounting remembers what the controller has forgotten.
state_of() {
  local states
  states=$(scontrol --oneliner show job "$1" 2>/dev/null | grep -o 'JobState=[A-Z_]*' | cut -d= -f2 | sort | uniq -c) ||
    states=$(sacct -nXP --jobs "$1" --format=State 2>/dev/null | sort | uniq -c) || true
  xargs <<<"${states:-forgotten by Slurm}"
}

explain() {
  local log found=''
  for log in "$run_dir/logs/$1-$2.log" "$run_dir/logs/$1-$2"_*.log; do
    if [[ -f $log ]] && grep -qE '^(error:|\[.*\] FAILED)' "$log"; then
      found=yes
      printf '  %s:\n' "$log"
      grep -E '^(error:|\[.*\] FAILED)' "$log" | tail -n 3 | sed 's/^/    /'
    fi
  done
  [[ -n $found ]] || echo "  never started: what it depends on did not succeed, or it was cancelled by hand"
}

read_arguments "$@"
load_site
if [[ -n $status ]]; then
  run_dir=$status
  show_status
  exit 0
fi
check_arguments
CHAIN_OPTIONS=()
if ((chain)); then
  export ON_PREEMPTION=end
  CHAIN_OPTIONS=(--no-requeue)
fi
submit_stages
if [[ -z $dry_run ]]; then note "watch: slurm/submit_all.sh --status $run_dir      stop: scancel ${jobs[*]}"; fi
