#!/usr/bin/env bash
#SBATCH --job-name=gptlike
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --output=slurm-%j.out
# Start a training script on all nodes of a Slurm job, one torchrun each. TESTED WITH STUBS of srun and scontrol only.
# Usage, in this folder: sbatch [SBATCH_FLAGS] scripts/run_slurm.sh [--dry_run] SCRIPT [SCRIPT_ARGS...]
# environment: MASTER_PORT=29500   GPUS_PER_HOST (ranks on each node: what Slurm gave the node, else 1)
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, NCCL_IB_DISABLE: handed on as they are; nothing is chosen here
# Example: sbatch --exclusive --mem=0 --nodes=4 --gpus-per-node=8 scripts/run_slurm.sh DeepSpeed-GPTLike-Multihosts.py
set -euo pipefail
die() { printf '%s: %s\n' run_slurm.sh "$1" >&2; exit "${2:-1}"; } # sbatch runs a copy with another name

main() {
  local dry_run=false names nodes port=${MASTER_PORT:-29500} on_node cmd
  if [[ "${1:-}" == --dry_run ]]; then dry_run=true; shift; fi
  cd "${SLURM_SUBMIT_DIR:-.}" 2>/dev/null || die "SLURM_SUBMIT_DIR=$SLURM_SUBMIT_DIR is no folder" # a copy runs
  [[ "${1:-}" == *.py && "$1" != -* && -f "$1" ]] || die "no such script in $PWD: ${1:-(none given)}" 2
  [[ "$port" =~ ^[1-9][0-9]{0,4}$ && "$port" -le 65535 ]] || die "MASTER_PORT=$port is no port" 2
  [[ "${GPUS_PER_HOST:-1}" =~ ^[1-9][0-9]{0,3}$ ]] || die "GPUS_PER_HOST=$GPUS_PER_HOST is no number of ranks" 2
  [[ -n "${SLURM_JOB_NODELIST:-}" ]] || die "this is no Slurm job: sbatch scripts/run_slurm.sh $1"
  names=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || die "scontrol cannot tell the nodes: its message is above"
  mapfile -t nodes <<< "$names"
  [[ "${nodes[0]}" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || die "scontrol names no first node: ${nodes[0]@Q}"
  export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}" # else srun gives a node's task one core
  [[ ! -x .venv/bin/python ]] || export PATH="$PWD/.venv/bin:$PATH" # srun hands it on
  [[ -n "${SLURM_GPUS_ON_NODE:-}" ]] || # on CPUs glibc is to keep freed memory for the next tensors; srun hands it on
    export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1000000000000}"
  # What differs between the nodes is for the shell there to fill in; all else comes to it as arguments.
  # shellcheck disable=SC2016
  on_node='exec torchrun --nproc_per_node="${GPUS_PER_HOST:-${SLURM_GPUS_ON_NODE:-1}}" --node_rank="$SLURM_NODEID" "$@"'
  cmd=(srun "--nodes=${#nodes[@]}" "--ntasks=${#nodes[@]}" --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c "$on_node"
    torchrun "--nnodes=${#nodes[@]}" "--master_addr=${nodes[0]}" "--master_port=$port" "$@")
  printf '+'; printf ' %q' "${cmd[@]}"; echo
  if "$dry_run"; then return; fi
  command -v srun >/dev/null || die "no srun here"
  exec "${cmd[@]}"
}

main "$@"
