#!/usr/bin/env bash
# Distil on a Slurm cluster: one launcher per node, one process per GPU, any number of nodes.
#
#   sbatch slurm/distill_xlmr.sh                                       XLM-R-large -> 12 x 384 (the default recipe)
#   sbatch --nodes 4 slurm/distill_xlmr.sh recipes/xlmr_large_l6_h384.yaml
#   sbatch slurm/distill_xlmr.sh RECIPE DS_JSON RUN_DIR [further arguments of pipeline/train.py]
#
# Before the time limit Slurm sends USR1; the run saves, leaves the marker PREEMPTED, and this script requeues the job,
# which then resumes. Marker DONE ends the chain. A run that fails by itself is not requeued.
# Site settings (account, modules, virtual environment): slurm/site.env, made from slurm/site.example.env.
#SBATCH --job-name=distill-xlmr
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=distill-%j.log
set -euo pipefail

# sbatch runs a copy from its spool directory; the repository is where the job was submitted.
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}"
if [[ ! -f pipeline/train.py ]]; then
  echo "error: $PWD is not the repository: submit from its root" >&2
  exit 2
fi
if [[ -f slurm/site.env ]]; then
  # shellcheck disable=SC1091  # the user's own file
  source slurm/site.env
fi

recipe=${1:-recipes/xlmr_large_l12_h384.yaml}
ds_json=${2:-ds_configs/zero2.json}
run_dir=${3:-runs/$(basename "$recipe" .yaml)}
if (($# > 3)); then extra=("${@:4}"); else extra=(); fi
max_restarts=${MAX_RESTARTS:-1000}
python=${PYTHON:-$PWD/.venv/bin/python}

for file in "$recipe" "$ds_json" "$python"; do
  if [[ ! -e $file ]]; then
    echo "error: $file is missing (virtual environment: make venv; site settings: slurm/site.example.env)" >&2
    exit 2
  fi
done

# GPUs of one node, in whichever variable this cluster sets (--gres leaves SLURM_GPUS_PER_NODE unset).
gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
gpus=${gpus##*:}
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

mkdir -p "$run_dir/logs"
rm -f "$run_dir/PREEMPTED"
cat <<TXT
[$(date '+%F %T')] job $SLURM_JOB_ID, life ${SLURM_RESTART_COUNT:-0}: $recipe with $ds_json
  on ${SLURM_JOB_NUM_NODES:-1} node(s) x $gpus process(es): $SLURM_JOB_NODELIST
  watch:  tail -f $run_dir/logs/*.log     tensorboard --logdir $(dirname "$run_dir")
  stop:   touch $run_dir/STOP  (saves first)     or  scancel $SLURM_JOB_ID
TXT

# One task per node starts torchrun; USR1 and USR2 must not kill the launcher, the ranks have handlers of their own.
srun --kill-on-bad-exit=1 --ntasks-per-node=1 \
  --output="$run_dir/logs/node-%N-life${SLURM_RESTART_COUNT:-0}.log" \
  bash -c 'trap "" USR1 USR2; exec "$@"' launcher \
  "$python" -m torch.distributed.run \
  --nnodes="${SLURM_JOB_NUM_NODES:-1}" --nproc_per_node="$gpus" \
  --rdzv_backend=c10d --rdzv_endpoint="$master:$port" --rdzv_id="$SLURM_JOB_ID" \
  pipeline/train.py --deepspeed "$ds_json" --recipe "$recipe" --run-dir "$run_dir" ${extra[@]+"${extra[@]}"} &
srun_pid=$!

forwarded=no
# shellcheck disable=SC2329  # called by the traps
forward() {
  forwarded=yes
  echo "[$(date '+%F %T')] $1 received: asking the ranks to save"
  kill -USR1 "$srun_pid" 2>/dev/null || true
}
trap 'forward USR1' USR1
trap 'forward TERM' TERM

code=0
wait "$srun_pid" || code=$?
while kill -0 "$srun_pid" 2>/dev/null; do # `wait` returns at every trapped signal
  code=0
  wait "$srun_pid" || code=$?
done

if [[ -f $run_dir/DONE ]]; then
  echo "[$(date '+%F %T')] done: $(cat "$run_dir/DONE")"
  exit 0
fi
if [[ -f $run_dir/PREEMPTED && $forwarded == yes ]]; then
  if ((${SLURM_RESTART_COUNT:-0} >= max_restarts)); then
    echo "error: restarted $max_restarts times already (MAX_RESTARTS); not requeued" >&2
    exit 1
  fi
  echo "[$(date '+%F %T')] saved; requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
if [[ -f $run_dir/PREEMPTED ]]; then
  echo "[$(date '+%F %T')] stopped on request: $(cat "$run_dir/PREEMPTED")"
  exit 0
fi
echo "error: the run ended with code $code and left no marker; not requeued. Last lines:" >&2
tail -n 20 "$run_dir"/logs/node-*-life"${SLURM_RESTART_COUNT:-0}".log >&2 || true
exit 1
