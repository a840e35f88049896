#!/usr/bin/env bash
# Check that nodes are fit for a run and equal to each other, and name each node that is not. Needs a few minutes.
#
#   sbatch --nodes 4 slurm/node_check.sh [RECIPE] [RUN_DIR] [--set KEY=VALUE ...]
#
# On each node: GPUs and driver, whether torch finds and uses all allotted GPUs, versions, commit, free space and write access
# in the run directory, the recipe's shards and teacher. Then one process per GPU joins a process group and all-reduces
# 64 MiB. Environment: MIN_FREE_GB (default 20), PROCESSES_PER_NODE, SITE_ENV, ALLOW_CPU_RANKS=1 (use CPUs despite GPUs).
#SBATCH --job-name=node-check
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=00:15:00
#SBATCH --output=node-check-%j.log
set -euo pipefail

# shellcheck source=slurm/lib/job.sh
source "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}/slurm/lib/job.sh"
enter_repository

recipe=${1:-recipes/xlmr_large_l12_h384.yaml}
run_dir=${2:-runs/$(basename "$recipe" .yaml)}
overrides=()
for word in "${@:3}"; do
  [[ $word == --set ]] || overrides+=("${word#--set=}")
done
need_path RECIPE "$recipe" "Recipes here: $(echo recipes/*.yaml)"
need_number MIN_FREE_GB "${MIN_FREE_GB:-20}" 0
processes=$(processes_per_node)
reports=$run_dir/node_check/job$SLURM_JOB_ID
mkdir -p "$reports"
mapfile -t nodes < <(nodes_of_job)
note "job $SLURM_JOB_ID: checking ${nodes[*]} for $recipe; reports in $reports"

# A failing node must not stop the reports of the others: the comparison names nodes without a report.
srun --kill-on-bad-exit=0 --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --output="${reports//%/%%}/%N.json" \
  --error="${reports//%/%%}/%N.log" "${SRUN_OPTIONS[@]}" "${CONTAINER[@]}" "$PYTHON" slurm/lib/probe_node.py \
  "$recipe" "$run_dir" "${MIN_FREE_GB:-20}" "${overrides[@]}" || true
code=0
on_node slurm/lib/compare_nodes.py "$reports" "${nodes[@]}" || code=1

# The tasks find the first node themselves only where scontrol is installed, which an image does not have.
MASTER_ADDR=$(master_address) srun --kill-on-bad-exit=0 --overcommit --ntasks="$((processes * ${#nodes[@]}))" --ntasks-per-node="$processes" \
  --cpus-per-task=1 --output="${reports//%/%%}/ranks-%N.log" "${SRUN_OPTIONS[@]}" "${CONTAINER[@]}" "$PYTHON" \
  slurm/lib/probe_ranks.py || true
for said in "reached the first rank" "all-reduce works"; do
  silent=()
  for node in "${nodes[@]}"; do
    (($(grep -c "$said" "$reports/ranks-$node.log" || true) == processes)) || silent+=("$node")
  done
  if ((${#silent[@]})); then
    note "BAD ${silent[*]}: not every rank there says '$said'; see $reports/ranks-${silent[0]}.log"
    code=1
    break
  fi
done
((code)) || note "all ${#nodes[@]} nodes are fit: $(grep -h 'all-reduce works' "$reports/ranks-${nodes[0]}.log" | head -n 1)"
exit "$code"
