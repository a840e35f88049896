#!/usr/bin/env bash
# Merge the languages that a job array has prepared into one set of shards, check every byte, and count tokens.
#
#   sbatch slurm/merge_shards.sh SHARDS [LANGUAGE ...]
#
# Merges every language under SHARDS.parts, or the named ones, as hard links: no second copy. A language that is not finished
# is an error that names it. Languages of an earlier merge stay, so that more can be added later.
#SBATCH --job-name=merge-shards
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=merge-%j.log
set -euo pipefail

# shellcheck source=slurm/lib/job.sh
source "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}/slurm/lib/job.sh"
enter_repository
# shellcheck source=slurm/lib/stages.sh
source slurm/lib/stages.sh

(($# >= 1)) || fail "usage: sbatch slurm/merge_shards.sh SHARDS [LANGUAGE ...]"
shards=$1
parts=$(parts_of "$shards")
need_path SHARDS "$parts" "Prepare first: sbatch --array=0-115%20 slurm/prepare_cc100.sh TEXT_DIR TOKENIZER ${shards@Q}"
if (($# > 1)); then
  languages=("${@:2}")
else
  languages=()
  for part in "$parts"/*/; do
    [[ ! -d $part ]] || languages+=("$(basename "$part")")
  done
fi
((${#languages[@]})) || fail "SHARDS: $parts holds no language. Prepare first: sbatch --array=0-115%20" \
  "slurm/prepare_cc100.sh TEXT_DIR TOKENIZER ${shards@Q}"

name_job merge-shards "$(basename "$shards")-merge"
new=() unfinished=() differing=()
for language in "${languages[@]}"; do
  if [[ ! -f $parts/$language/manifest.json ]]; then
    unfinished+=("$language")
  elif [[ ! -d $shards/$language ]]; then
    new+=("$parts/$language")
  elif [[ -f $shards/$language/journal.jsonl ]] &&
    ! cmp --silent "$parts/$language/$language/journal.jsonl" "$shards/$language/journal.jsonl"; then
    differing+=("$language")
  fi
done
if ((${#unfinished[@]})); then
  fail "not finished: ${unfinished[*]}. Submit the array again (finished languages are skipped), or name the languages" \
    "to merge: sbatch slurm/merge_shards.sh ${shards@Q} LANGUAGE ..."
fi

if ((${#differing[@]})); then
  fail "${differing[*]}: prepared again in $parts since the merge into $shards, with other results. To use the new shards:" \
    "rm -r $(printf '%q ' "${differing[@]/#/$shards/}")and submit this again"
fi

note "merging ${#new[@]} of ${#languages[@]} languages into $shards (the others are merged already)"
on_node -m data_prep merge "$shards" ${new[@]+--from "${new[@]}"}
on_node -m data_prep verify "$shards"
on_node -m data_prep stats "$shards"
note "finished: $shards. $parts can be removed; its shards are hard links to the same data"
