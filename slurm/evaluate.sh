#!/usr/bin/env bash
# Export the student of a finished run, evaluate it and its teacher, and write a report.
#
#   sbatch slurm/evaluate.sh RUN_DIR [arguments of `python -m pipeline evaluate`: --tasks, --set; default: --tasks retrieval]
#
# Writes RUN_DIR/student (Hugging Face directory), RUN_DIR/evaluation/evaluation.json and .png, and the report page. A student
# that was exported there after the end of the run is reused. Jobs on one run directory wait for each other's export. With
# `sbatch --gpus-per-node=8 ...` one process per GPU shares the tasks that fine-tune (xnli, pawsx, mlqa, tagging). An interrupted
# job resumes: finished grid points and epochs of these tasks are kept.
#
# Of a run with several students the exports are RUN_DIR/students/NAME/student. The teacher is evaluated once, with all
# students, into RUN_DIR/evaluation. Where they read different teacher layers, it is evaluated once for each layer, with the
# students of that layer, into RUN_DIR/students/NAME/evaluation of the first of them. A student whose newest checkpoint does
# not hold it (removed or renamed during the run) is left out.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=evaluate-%j.log
set -euo pipefail

# shellcheck source=slurm/lib/job.sh
source "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}/slurm/lib/job.sh"
enter_repository

(($# >= 1)) || fail "usage: sbatch slurm/evaluate.sh RUN_DIR [arguments of \`python -m pipeline evaluate\`]"
run_dir=$1
shift
need_path RUN_DIR "$run_dir" "It is the --run-dir of the training job"
name_job evaluate "$(basename "$run_dir")-evaluate"
need_path RUN_DIR "$run_dir/DONE" "The run is not finished: submit slurm/distill_xlmr.sh again with the same run directory"
(($#)) || set -- --tasks retrieval

# The teacher is evaluated at the distilled layer (of several, the one matched to the highest student layer). The student's
# own layer is recorded in its export.
teacher_of() {
  on_node -c '
import sys, yaml
recipe = yaml.safe_load(open(sys.argv[1], encoding="utf-8"))
relations = recipe.get("relations", {})
matched = relations.get("layers") or [{"teacher": relations.get("teacher_layer"), "student": None}]
layer = max(matched, key=lambda pair: pair["student"] or 0)["teacher"]
print(recipe["teacher"] + (f"@{layer}" if layer else ""))' "$1/recipe.yaml"
}

# Whether the newest checkpoint holds the student. Students that were added later have a directory of checkpoints of their own.
is_saved() {
  local checkpoints newest
  for checkpoints in "$run_dir"/checkpoints "$run_dir"/checkpoints-*; do
    newest=$(find "$checkpoints" -maxdepth 1 -name 'step-*[0-9]' 2>/dev/null | sort -V | tail -n 1)
    [[ -z $newest || ! -d $newest/$1 ]] || return 0
  done
  return 1
}

is_exported() {
  [[ $1/student/lineage.json -nt $run_dir/DONE ]]
}

# Two exports into one directory would corrupt each other's files, and a later one the files that another job reads.
export_once() {
  local directory=$1 name=$2
  exec 9>>"$directory/student.lock"
  if command -v flock >/dev/null && ! flock 9; then
    note "$directory has no file locks: do not start another evaluation of this run until the export is finished"
  fi
  if is_exported "$directory"; then
    note "$directory/student exists already"
  else
    on_node -m pipeline export "$run_dir" --output "$directory/student" ${name:+--student "$name"} 9>&-
  fi
  exec 9>&-
}

evaluate=(-m pipeline evaluate)
gpus=${SLURM_GPUS_ON_NODE:-1}
if ((gpus > 1)); then
  evaluate=(-m torch.distributed.run --standalone --nproc-per-node="$gpus" "${evaluate[@]}")
fi

# The files of one student are in the run directory, those of several in students/NAME.
students=("")
if [[ -d $run_dir/students ]]; then
  students=()
  for path in "$run_dir"/students/*/; do
    students+=("$(basename "$path")")
  done
fi
directories=() teachers=() # of the students that are evaluated
for name in "${students[@]}"; do
  directory=$run_dir${name:+/students/$name}
  if [[ -n $name && ! -f $directory/recipe.yaml ]]; then
    note "left out: $directory has no recipe.yaml, so no training of this student has begun"
    continue
  elif [[ -n $name ]] && ! is_saved "$name" && ! is_exported "$directory"; then
    note "left out: the newest checkpoint does not hold the student $name (removed or renamed during the run?)"
    continue
  fi
  teacher=$(teacher_of "$directory")
  export_once "$directory" "$name"
  directories+=("$directory") teachers+=("$teacher")
done
((${#directories[@]})) || fail "no student of $run_dir is in its newest checkpoint"

mapfile -t distinct < <(printf '%s\n' "${teachers[@]}" | sort -uV)
for teacher in "${distinct[@]}"; do
  models=() output=''
  for number in "${!directories[@]}"; do
    [[ ${teachers[number]} == "$teacher" ]] || continue
    models+=("${directories[number]}/student")
    output=${output:-${directories[number]}/evaluation}
  done
  ((${#distinct[@]} > 1)) || output=$run_dir/evaluation
  note "job $SLURM_JOB_ID on $(hostname): ${models[*]} against $teacher"
  on_node "${evaluate[@]}" "$teacher" "${models[@]}" --output "$output" "$@"
done
on_node -m pipeline report "$run_dir"
note "finished: ${directories[*]/%//student}"
