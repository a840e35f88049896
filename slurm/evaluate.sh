#!/usr/bin/env bash
# Export the student of a finished run, evaluate it and its teacher, and write a report.
#
#   sbatch slurm/evaluate.sh RUN_DIR [arguments of `python -m pipeline evaluate`: --tasks, --set; default: --tasks retrieval]
#
# Writes RUN_DIR/student (Hugging Face directory), RUN_DIR/evaluation/evaluation.json and .png, and the report page. A student
# that was exported there after the end of the run is reused. Jobs on one run directory wait for each other's export. With
# `sbatch --gpus-per-node=8 ...` one process per GPU shares the tasks that fine-tune (xnli, mlqa). An interrupted job resumes:
# finished grid points and epochs of these tasks are kept.
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
teacher=$(on_node -c '
import sys, yaml
recipe = yaml.safe_load(open(sys.argv[1], encoding="utf-8"))
relations = recipe.get("relations", {})
matched = relations.get("layers") or [{"teacher": relations.get("teacher_layer"), "student": None}]
layer = max(matched, key=lambda pair: pair["student"] or 0)["teacher"]
print(recipe["teacher"] + (f"@{layer}" if layer else ""))' "$run_dir/recipe.yaml")

# Two exports into one directory would corrupt each other's files, and a later one the files that another job reads.
export_once() {
  exec 9>>"$run_dir/student.lock"
  if command -v flock >/dev/null && ! flock 9; then
    note "$run_dir has no file locks: do not start another evaluation of this run until the export is finished"
  fi
  if [[ $run_dir/student/lineage.json -nt $run_dir/DONE ]]; then
    note "$run_dir/student exists already"
  else
    on_node -m pipeline export "$run_dir" --output "$run_dir/student" 9>&-
  fi
  exec 9>&-
}

note "job $SLURM_JOB_ID on $(hostname): $run_dir against $teacher"
export_once
evaluate=(-m pipeline evaluate)
gpus=${SLURM_GPUS_ON_NODE:-1}
if ((gpus > 1)); then
  evaluate=(-m torch.distributed.run --standalone --nproc-per-node="$gpus" "${evaluate[@]}")
fi
on_node "${evaluate[@]}" "$teacher" "$run_dir/student" --output "$run_dir/evaluation" "$@"
on_node -m pipeline report "$run_dir"
note "finished: $run_dir/student"
