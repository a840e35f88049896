# shellcheck shell=bash
# What every Slurm script here shares: messages, checks, the site's settings, and how a command is started on the nodes.
# Sourced from the repository, never from Slurm's spool copy of a script.

# -- messages

note() {
  printf '[%(%F %T)T] %s\n' -1 "$*"
}

# The user can mend it: one paragraph, exit code 2.
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# -- checks

need_path() { # NAME PATH HOW_TO_GET_IT
  [[ -e $2 ]] || fail "$1: there is no $2. $3"
}

need_number() { # NAME VALUE LEAST
  if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then
    fail "$1 is '$2'; it must be a whole number of at least $3"
  fi
}

# -- where things are

# The repository is where the job was submitted: sbatch runs a copy of the script from its spool directory.
enter_repository() {
  cd "${SLURM_SUBMIT_DIR:-.}" || exit
  [[ -f pipeline/train.py ]] || fail "$PWD is not the repository: submit from its root"
  load_site
}

# Defaults, then the site's own file over them. Arrays, so that values with spaces stay whole.
# shellcheck disable=SC2034  # the *_SBATCH are for submit_all.sh
load_site() {
  SRUN_OPTIONS=() CONTAINER=() PREPARE_OPTIONS=()
  PREPARE_SBATCH=() MERGE_SBATCH=() TRAIN_SBATCH=() EVALUATE_SBATCH=()
  local site=${SITE_ENV:-slurm/site.env}
  if [[ -f $site ]]; then
    # shellcheck disable=SC1090  # the user's own file
    source "$site"
  elif [[ -n ${SITE_ENV:-} ]]; then
    fail "SITE_ENV: there is no $site. Copy slurm/site.example.env and adapt it"
  fi
  PYTHON=${PYTHON:-$PWD/.venv/bin/python}
  # A container has its own Python, which cannot be looked up from outside.
  if ((${#CONTAINER[@]} + ${#SRUN_OPTIONS[@]} == 0)) && ! command -v "$PYTHON" >/dev/null; then
    fail "there is no Python at $PYTHON. Make the virtual environment (make venv), or set PYTHON in $site"
  fi
}

# Python on the job's first node, inside the site's container: `srun` has to start it, as one kind of container (pyxis)
# comes with srun's options, and the batch script itself is always outside.
on_node() {
  srun --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${SRUN_OPTIONS[@]}" "${CONTAINER[@]}" "$PYTHON" "$@"
}

# What `squeue` shows for this job: the run's name first. A name given to sbatch stays.
name_job() { # DEFAULT_OF_THE_SCRIPT NAME
  if [[ ${SLURM_JOB_NAME:-} == "$1" ]]; then
    scontrol update "jobid=$SLURM_JOB_ID" "jobname=$2" &>/dev/null || true # only a name
  fi
}

# -- nodes

nodes_of_job() {
  scontrol show hostnames "$SLURM_JOB_NODELIST"
}

# Where the ranks meet: the first node's name where names resolve, else the address that Slurm knows it by.
master_address() {
  local first
  first=$(nodes_of_job | head -n 1)
  if getent hosts "$first" >/dev/null; then
    echo "$first"
  else
    scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
  fi
}

# One process per GPU; on nodes without GPUs the number has to be said. --gres sets SLURM_GPUS_ON_NODE alone.
processes_per_node() {
  local gpus=${SLURM_GPUS_ON_NODE:-0}
  if [[ -z ${PROCESSES_PER_NODE:-} ]] && ((gpus == 0)); then
    fail "this job has no GPU on $(hostname). Ask for some (sbatch --gpus-per-node=8 ...), or say how many processes" \
      "per node shall run on CPUs (PROCESSES_PER_NODE=2 sbatch --gpus-per-node=0 ...)"
  fi
  need_number PROCESSES_PER_NODE "${PROCESSES_PER_NODE:-$gpus}" 1
  echo "${PROCESSES_PER_NODE:-$gpus}"
}

# Below the range that the kernel gives out by itself (32768 and up), and another one for every life of a job.
meeting_port() {
  echo $((15000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0} * 13) % 15000))
}

# torchrun on every node, through one srun task per node: start_ranks LOG_PREFIX PROCESSES_PER_NODE SCRIPT [ARGUMENT ...]
# Stop signals are for the ranks, which save; the launchers between must not die of them, and torchrun is told to leave
# all but Ctrl-C alone. A node's log is LOG_PREFIX-NODE.log. Call it with `&`: the subshell becomes srun, so that $! can be
# signalled.
start_ranks() {
  local prefix=$1 processes=$2 master port
  shift 2
  master=$(master_address)
  port=$(meeting_port)
  # PET_ is torchrun's own prefix for its options: only the node knows its number.
  # shellcheck disable=SC2016  # expanded on the node
  exec srun --kill-on-bad-exit=1 --wait=60 --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    --output="${prefix//%/%%}-%N.log" "${SRUN_OPTIONS[@]}" \
    bash -c 'trap "" TERM USR1 USR2; export PET_NODE_RANK=$SLURM_NODEID; exec "$@"' launcher \
    "${CONTAINER[@]}" "$PYTHON" -m torch.distributed.run --nnodes="${SLURM_JOB_NUM_NODES:-1}" \
    --nproc-per-node="$processes" --master-addr="$master" --master-port="$port" --max-restarts=0 \
    --signals-to-handle=SIGINT "$@"
}
