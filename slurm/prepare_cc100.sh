#!/usr/bin/env bash
# Prepare token shards from text on CPU nodes: a job array with one language per task. Next step: slurm/merge_shards.sh
#
#   sbatch --array=0-115%20 slurm/prepare_cc100.sh TEXT_DIR TOKENIZER SHARDS [LANGUAGE ...]
#
# TEXT_DIR holds en.txt.xz, zh-Hans.txt.xz, ..., or directories en/, zh-Hans/. Without LANGUAGE, all of them are prepared, in
# alphabetical order. Task N prepares language N; numbers above the last language end immediately. After a failure, submit the
# array again: finished languages are skipped, interrupted ones resume. PREPARE_OPTIONS, an array in the site's settings, is
# passed to `data_prep prepare`.
#SBATCH --job-name=prepare-cc100
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=prepare-%A_%a.log
set -euo pipefail

# shellcheck source=slurm/lib/job.sh
source "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}/slurm/lib/job.sh"
enter_repository
# shellcheck source=slurm/lib/stages.sh
source slurm/lib/stages.sh

(($# >= 3)) || fail "usage: sbatch --array=0-115%20 slurm/prepare_cc100.sh TEXT_DIR TOKENIZER SHARDS [LANGUAGE ...]"
text=$1 tokenizer=$2 shards=$3
need_path TEXT_DIR "$text" "It is the directory of en.txt.xz, de.txt.xz, ..."
need_path TOKENIZER "$tokenizer" "$(how_to_get_tokenizer "$tokenizer")"
need_number SLURM_ARRAY_TASK_ID "${SLURM_ARRAY_TASK_ID:-'' (submit with --array)}" 0

if (($# > 3)); then
  languages=("${@:4}")
else
  mapfile -t languages < <(languages_of "$text")
fi
if ((SLURM_ARRAY_TASK_ID >= ${#languages[@]})); then
  note "task $SLURM_ARRAY_TASK_ID: there are only ${#languages[@]} languages; nothing to do"
  exit 0
fi
language=${languages[SLURM_ARRAY_TASK_ID]}
mapfile -t files < <(texts_of "$text" "$language")
((${#files[@]})) || fail "LANGUAGE: no text found at $text/$language.txt.xz (or .txt, .jsonl, .parquet, or a directory" \
  "$text/$language). Languages there: $(languages_of "$text" 2>/dev/null | tr '\n' ' ')"

part=$(parts_of "$shards")/$language
mkdir -p "$(dirname "$part")"
name_job prepare-cc100 "$(basename "$shards")-prepare"
note "task $SLURM_ARRAY_TASK_ID on $(hostname): $language from ${files[*]} into $part, ${SLURM_CPUS_PER_TASK:-1} workers"
code=0
on_node -m data_prep prepare --input "${files[@]}" --language "$language" --tokenizer "$tokenizer" --output "$part" \
  --workers "${SLURM_CPUS_PER_TASK:-1}" "${PREPARE_OPTIONS[@]}" || code=$?
if ((code != 0)); then
  note "FAILED: $language (code $code). Jobs that depend on this array are cancelled. The reason is above; fix it" \
    "and submit the array again: finished languages are skipped"
  exit 1
fi
note "finished: $language"
