#!/usr/bin/env bash
# Queue all stages from text to an evaluated student: prepare (array) -> merge -> train -> evaluate.
#
#   slurm/submit_all.sh --text /data/cc100 --tokenizer /models/xlm-roberta-large --shards data/cc100_shards \
#     --recipe recipes/xlmr_large_l12_h384.yaml --nodes 4 [--dry-run] [-- arguments of pipeline/train.py]
#   slurm/submit_all.sh --from train --recipe recipes/xlmr_large_l12_h384.yaml     earlier stages are done already
#   slurm/submit_all.sh --status runs/xlmr_large_l12_h384                          the state of each stage, and errors
#
# --shards: the directory that prepare and merge write and that training reads (`data`). Options: --run-dir DIR, --ds JSON,
# --languages "de en sw", --at-once N (array tasks that run at the same time, default 20), --evaluate "ARGUMENTS", --chain N
# (for clusters that forbid requeueing: N training jobs, one after another, instead of one that requeues). Each stage starts
# when the stage before it has succeeded; when one fails, Slurm cancels the rest. The site's settings hold the sbatch options
# of each stage. Job numbers are recorded in RUN_DIR/jobs.tsv.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."
export SLURM_SUBMIT_DIR=$PWD
# shellcheck source=slurm/lib/job.sh
source slurm/lib/job.sh
# shellcheck source=slurm/lib/stages.sh
source slurm/lib/stages.sh
STAGES=(prepare merge train evaluate)
LAST_LINES=12 MOST_LOGS=5 # of failed jobs, that --status shows

read_arguments() {
  text='' tokenizer='' shards='' recipe='' run_dir='' ds_json=ds_configs/zero2.json nodes=1 first=prepare at_once=20
  languages=() evaluate_arguments=() train_arguments=() chain=0 dry_run='' status=''
  while (($#)); do
    case $1 in
      --dry-run) dry_run=yes && shift && continue ;;
      --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' slurm/submit_all.sh && exit 0 ;;
      --) shift && train_arguments=("$@") && break ;;
    esac
    case $1 in
      --set | --set=* | --allow-change) fail "$1 is an argument of pipeline/train.py: put it after --, at the end (-- --set steps=7)" ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
    esac
    (($# >= 2)) || fail "$1 needs a value, or is not an option of this script (see --help)"
    case $1 in
      --text) text=$(from_caller "$2") ;;
      --tokenizer) tokenizer=$(from_caller "$2") ;;
      --shards) shards=$(from_caller "$2") ;;
      --recipe) recipe=$(from_caller "$2") ;;
      --run-dir) run_dir=$(from_caller "$2") ;;
      --ds) ds_json=$(from_caller "$2") ;;
      --nodes) nodes=$2 ;;
      --from) first=$2 ;;
      --at-once) at_once=$2 ;;
      --chain) chain=$2 ;;
      --status) status=$(from_caller "$2") ;;
      --languages) read_languages "$2" ;;
      --evaluate) mapfile -t evaluate_arguments < <(xargs printf '%s\n' <<<"$2") ;; # xargs parses quotes
      *) fail "unknown option $1 (see --help)" ;;
    esac
    shift 2
  done
}

# Separated by spaces or commas. A repeated name counts once: two tasks would otherwise prepare the same shards.
read_languages() {
  mapfile -t languages < <(tr -s ' ,\t' '\n' <<<"$1" | awk 'NF && !seen[$0]++')
  ((${#languages[@]})) || fail "--languages is empty; leave it out for all languages of --text"
}

# A relative path is relative to the directory of the caller, or to the repository where it exists only there.
from_caller() { # PATH
  if [[ $1 == /* || $caller == "$PWD" || -z $1 ]] || [[ -e $1 && ! -e $caller/$1 ]]; then
    printf '%s\n' "$1"
  else
    realpath --canonicalize-missing -- "$caller/$1"
  fi
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
    need_path --tokenizer "${tokenizer:-(not given)}" "$(how_to_get_tokenizer "${tokenizer:-TEACHER}")"
    ((${#languages[@]})) || mapfile -t languages < <(languages_of "$text")
    ((${#languages[@]})) || fail "--text: $text holds no text of a CC-100 language (en.txt.xz, zh-Hans.jsonl.gz, sw/part-1.txt)"
    check_languages
  fi
  if [[ $first == prepare || $first == merge ]]; then
    [[ -n $shards ]] || fail "--shards is missing: the directory that the token shards are written to and that training reads"
  fi
  [[ -z $shards ]] || pass_on_shards
  check_queue
}

check_languages() {
  local language most
  for language in "${languages[@]}"; do
    [[ -n $(texts_of "$text" "$language") ]] || fail "--languages: no text of '$language' found in $text. Languages" \
      "there: $(languages_of "$text" 2>/dev/null | tr '\n' ' ')"
  done
  most=$(scontrol show config 2>/dev/null | sed -n 's/^MaxArraySize *= *//p') || true
  if [[ -n $most ]] && ((${#languages[@]} > most)); then
    fail "--text: ${#languages[@]} languages, and this cluster's job arrays have at most $most tasks (MaxArraySize)." \
      "Submit them in parts: --languages \"...\""
  fi
}

# Training reads the prepared shards: --shards becomes a --set before the caller's own, and the two must agree.
pass_on_shards() {
  local word previous='' other of_recipe
  for word in "${train_arguments[@]}"; do
    other=''
    [[ $previous != --set || $word != data=* ]] || other=${word#data=}
    [[ $word != --set=data=* ]] || other=${word#--set=data=}
    if [[ -n $other ]] && ! same_path "$(unquoted "$other")" "$shards"; then
      fail "--shards is $shards, and --set data=$other would make training read another directory. Leave one of them out"
    fi
    previous=$word
  done
  of_recipe=$(sed -n 's/^data:[[:space:]]*//p' "$recipe" | sed 's/[[:space:]]#.*$//;s/[[:space:]]*$//')
  if [[ -n $of_recipe ]] && ! same_path "$(unquoted "$of_recipe")" "$shards"; then
    note "training reads $shards (--shards) instead of $(unquoted "$of_recipe") (data in $recipe)" >&2
  fi
  if [[ $shards =~ ^[A-Za-z0-9_./][A-Za-z0-9_./\ +=@-]*$ ]]; then
    train_arguments=(--set "data=$shards" "${train_arguments[@]}")
  else # in YAML's quotes
    train_arguments=(--set "data='${shards//\'/\'\'}'" "${train_arguments[@]}")
  fi
}

unquoted() { # VALUE, with or without YAML's quotes
  sed "s/^'\(.*\)'\$/\1/;s/^\"\(.*\)\"\$/\1/;s/''/'/g" <<<"$1"
}

same_path() { # PATH PATH
  [[ $(realpath --canonicalize-missing -- "$1") == $(realpath --canonicalize-missing -- "$2") ]]
}

# Two jobs must not use one run directory, nor two arrays one set of shards.
check_queue() {
  local stage number rest state active=() numbers=()
  [[ -f $run_dir/jobs.tsv && -z $dry_run ]] || return 0
  while IFS=$'\t' read -r stage number rest; do
    state=$(squeue --noheader "--jobs=$number" --format=%T 2>/dev/null | sort -u | xargs) || true
    if [[ -n $state && ! ($stage == evaluate && $first == evaluate) ]]; then
      active+=("$stage $number ($state)")
      numbers+=("$number")
    fi
  done <"$run_dir/jobs.tsv"
  ((${#active[@]} == 0)) || fail "$run_dir has jobs in the queue already: ${active[*]}. Wait for them, or cancel them first:" \
    "scancel ${numbers[*]}"
}

# submit STAGE DEPENDENCY SBATCH_ARGUMENT ...: sets `job` to the number of the new job, and records it.
submit() {
  local stage=$1 dependency=$2
  shift 2
  local command=(sbatch --parsable "--job-name=$(basename "$run_dir")-$stage" --kill-on-invalid-dep=yes
    ${dependency:+"--dependency=$dependency"} "$@")
  if [[ -n $dry_run ]]; then
    job="<$stage>"
    echo "${command[*]@Q}"
    return
  fi
  job=$("${command[@]}") || fail "sbatch rejected the $stage job (its reason is above). Jobs queued so far: $run_dir/jobs.tsv"
  job=${job%%;*}
  jobs+=("$job")
  printf '%s\t%s\t%(%F %T)T\n' "$stage" "$job" -1 >>"$run_dir/jobs.tsv"
  note "$stage: job $job${dependency:+, after $dependency}"
}

submit_stages() {
  local logs=$run_dir/logs before='' link
  job='' jobs=()
  [[ -n $dry_run ]] || mkdir -p "$logs" || fail "--run-dir: $logs cannot be created. Use another --run-dir"
  logs=${logs//%/%%} # sbatch replaces %j and the like
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
    if [[ $state =~ FAIL|CANCELLED|TIMEOUT|OUT_OF_MEMORY|DEADLINE ]]; then explain "$stage" "$number" "$state"; fi
  done <"$run_dir/jobs.tsv"
  local marker
  for marker in DONE PREEMPTED FAILED; do
    if [[ -f $run_dir/$marker ]]; then echo "training: $marker: $(<"$run_dir/$marker")"; fi
  done
}

# All states of a job or of an array's tasks. Accounting keeps jobs that the controller has forgotten.
state_of() {
  local states
  states=$(scontrol --oneliner show job "$1" 2>/dev/null | grep -o 'JobState=[A-Z_]*' | cut -d= -f2 | sort | uniq -c) ||
    states=$(sacct -nXP --jobs "$1" --format=State 2>/dev/null | sort | uniq -c) || true
  xargs <<<"${states:-forgotten by Slurm}"
}

# Why a stage failed: the error lines and the end of each of its logs; of an array, those of the tasks that did not finish.
explain() { # STAGE JOB STATE
  local log has_log='' unfinished=()
  for log in "$run_dir/logs/$1-$2.log" "$run_dir/logs/$1-$2"_*.log; do
    [[ -f $log ]] || continue
    has_log=yes
    if [[ $log == *_*.log ]] && grep -qE '^\[.*\] (finished: |task [0-9]+: there are only)' <(tail -n 1 "$log"); then continue; fi
    unfinished+=("$log")
  done
  if [[ -z $has_log && $3 == *CANCELLED* ]]; then
    echo "  never started: a job that it depends on did not succeed, or it was cancelled manually"
  elif [[ -z $has_log ]]; then
    echo "  no log $run_dir/logs/$1-$2*.log: the node failed before the script began, or could not write there. See: scontrol show job $2"
  fi
  for log in "${unfinished[@]:0:MOST_LOGS}"; do end_of "$log"; done
  if ((${#unfinished[@]} > MOST_LOGS)); then echo "  and $((${#unfinished[@]} - MOST_LOGS)) more: $run_dir/logs/$1-$2_*.log"; fi
}

end_of() { # LOG
  printf '  the end of %s:\n' "$1"
  if [[ -s $1 ]]; then
    tail -n "$LAST_LINES" "$1" | cut -c 1-500 | sed 's/^/    /'
    # Errors further up, for logs that end with lines of Slurm itself.
    grep -E '^(error:|\[.*\] FAILED)' "$1" | tail -n 3 | cut -c 1-500 | grep -vFf <(tail -n "$LAST_LINES" "$1" | cut -c 1-500) |
      sed 's/^/    above: /' || true
  else
    echo "    (the log is empty)"
  fi
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
