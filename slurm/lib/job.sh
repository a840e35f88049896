# shellcheck shell=bash
# Shared by all Slurm scripts: messages, checks, the site's settings, and starting commands on the nodes. Sourced from the
# repository, never from Slurm's spool copy of a script.

# -- messages

note() {
  printf '[%(%F %T)T] %s\n' -1 "$*"
}

# An error that the user can fix: one paragraph, exit code 2.
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# -- checks

need_path() { # NAME PATH HOW_TO_GET_IT
  [[ -e $2 ]] || fail "$1: $2 not found. $3"
}

need_number() { # NAME VALUE LEAST
  if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then
    fail "$1 is '$2'; it must be an integer of at least $3"
  fi
}

# -- paths

# The job must be submitted from the repository: sbatch runs a copy of the script from its spool directory.
enter_repository() {
  cd "${SLURM_SUBMIT_DIR:-.}" || exit
  [[ -f pipeline/train.py ]] || fail "$PWD is not the repository: submit from its root"
  load_site
}

# Defaults, then the site's own file. Arrays, so that values may contain spaces.
# shellcheck disable=SC2034  # the *_SBATCH are for submit_all.sh
load_site() {
  SRUN_OPTIONS=() CONTAINER=() PREPARE_OPTIONS=()
  PREPARE_SBATCH=() MERGE_SBATCH=() TRAIN_SBATCH=() EVALUATE_SBATCH=()
  local site=${SITE_ENV:-slurm/site.env}
  if [[ -f $site ]]; then
    # shellcheck disable=SC1090  # the user's own file
    source "$site"
  elif [[ -n ${SITE_ENV:-} ]]; then
    fail "SITE_ENV: $site not found. Copy slurm/site.example.env and adapt it"
  fi
  PYTHON=${PYTHON:-$PWD/.venv/bin/python}
  # The Python of a container cannot be checked from outside.
  if ((${#CONTAINER[@]} + ${#SRUN_OPTIONS[@]} == 0)) && ! command -v "$PYTHON" >/dev/null; then
    fail "no Python found at $PYTHON. Make the virtual environment (make venv), or set PYTHON in $site"
  fi
}

# Python on the job's first node, inside the site's container. `srun` must start it: pyxis containers are options of srun, and
# the batch script itself always runs outside.
on_node() {
  srun --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${SRUN_OPTIONS[@]}" "${CONTAINER[@]}" "$PYTHON" "$@"
}

# The job's name in `squeue`: the run's name first. A name that was given to sbatch is kept.
name_job() { # DEFAULT_OF_THE_SCRIPT NAME
  if [[ ${SLURM_JOB_NAME:-} == "$1" ]]; then
    scontrol update "jobid=$SLURM_JOB_ID" "jobname=$2" &>/dev/null || true # a name is not worth a failure
  fi
}

# -- nodes

nodes_of_job() {
  scontrol show hostnames "$SLURM_JOB_NODELIST"
}

# MASTER_ADDR of the ranks: the first node's name where names resolve, otherwise the address that Slurm has for it.
master_address() {
  local first
  first=$(nodes_of_job | head -n 1)
  if getent hosts "$first" >/dev/null; then
    echo "$first"
  else
    scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
  fi
}

# One process per GPU. On nodes without GPUs the number must be given. --gres sets only SLURM_GPUS_ON_NODE.
processes_per_node() {
  local gpus=${SLURM_GPUS_ON_NODE:-0}
  if [[ -z ${PROCESSES_PER_NODE:-} ]] && ((gpus == 0)); then
    fail "this job has no GPU on $(hostname). Request GPUs (sbatch --gpus-per-node=8 ...), or give the number of processes" \
      "per node to run on CPUs (PROCESSES_PER_NODE=2 sbatch --gpus-per-node=0 ...)"
  fi
  need_number PROCESSES_PER_NODE "${PROCESSES_PER_NODE:-$gpus}" 1
  echo "${PROCESSES_PER_NODE:-$gpus}"
}

# Below the kernel's range of automatic ports (32768 and up), and a different one for every attempt of a job.
master_port() {
  echo $((15000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0} * 13) % 15000))
}

# torchrun on every node, through one srun task per node: start_ranks LOG_PREFIX PROCESSES_PER_NODE SCRIPT [ARGUMENT ...]
# Stop signals are for the ranks, which save. torchrun must survive them, so it handles Ctrl-C only (launcher.sh). The log of a
# node is LOG_PREFIX-NODE.log. Call this with `&`: the subshell becomes srun, so that $! can receive signals.
start_ranks() {
  local prefix=$1 processes=$2 master port
  shift 2
  master=$(master_address)
  port=$(master_port)
  # PET_ is torchrun's own prefix for its options. Only the node knows its number. Signals are ignored once more in the
  # container, because a command in Apptainer starts with the default actions, whatever is ignored outside.
  # shellcheck disable=SC2016  # expanded on the node
  exec srun --kill-on-bad-exit=1 --wait=60 --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    --output="${prefix//%/%%}-%N.log" "${SRUN_OPTIONS[@]}" bash slurm/lib/launcher.sh "$1" "${CONTAINER[@]}" \
    bash -c 'trap "" TERM USR1 USR2; export PET_NODE_RANK=$SLURM_NODEID; exec "$@"' node "$PYTHON" -m torch.distributed.run \
    --nnodes="${SLURM_JOB_NUM_NODES:-1}" --nproc-per-node="$processes" --master-addr="$master" --master-port="$port" \
    --max-restarts=0 --signals-to-handle=SIGINT "$@"
}
