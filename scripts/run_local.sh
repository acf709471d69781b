#!/usr/bin/env bash
# Run one training script on this host: on all its GPUs, or on two CPU ranks where it has none.
# Usage: scripts/run_local.sh [--dry_run] SCRIPT [SCRIPT_ARGS...]
# environment: NUM_GPUS (ranks: the first N GPUs, or N CPU ranks)   CUDA_VISIBLE_DEVICES=0,2 (these GPUs)   MASTER_PORT=29500
# Example: CUDA_VISIBLE_DEVICES=0,2 scripts/run_local.sh DeepSpeed-GPTLike-ZeRO-2.py --epochs 1
set -euo pipefail
die() { printf '%s: %s\n' "${0##*/}" "$1" >&2; exit "${2:-1}"; }

# The arguments that make deepspeed take the devices asked for, one a line. With --num_gpus it ignores
# CUDA_VISIBLE_DEVICES and takes the first GPUs, so that the two never go together.
which_devices() {
  local gpus=$1 ranks=${NUM_GPUS:-} visible=${CUDA_VISIBLE_DEVICES-unset} ids=()
  [[ -z "$ranks" || "$ranks" =~ ^[1-9][0-9]{0,3}$ ]] || die "NUM_GPUS=$ranks is not a number of ranks" 2
  if [[ "$visible" == unset || ( -z "$visible" && "$gpus" == 0 ) ]]; then
    [[ -n "$ranks" || "$gpus" != 0 ]] || ranks=2
    [[ -z "$ranks" ]] || printf '%s\n' --num_gpus "$ranks"
    return
  fi
  [[ "$visible" =~ ^[0-9]+(,[0-9]+)*$ ]] ||
    die "CUDA_VISIBLE_DEVICES='$visible': deepspeed takes GPU numbers such as 0,2; write those, or unset it" 2
  IFS=, read -ra ids <<< "$visible"
  [[ -z "$ranks" || "$ranks" == "${#ids[@]}" ]] ||
    die "NUM_GPUS=$ranks, but CUDA_VISIBLE_DEVICES=$visible names ${#ids[@]} (with --num_gpus deepspeed would ignore \
the variable and take the first GPUs): unset one of the two" 2
  printf '%s\n' --include "localhost:$visible"
}

main() {
  local root dry_run=false gpus devices port=${MASTER_PORT:-29500} cmd=()
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  if [[ "${1:-}" == --dry_run ]]; then dry_run=true; shift; fi
  [[ "${1:-}" == *.py && "$1" != -* && -f "$1" ]] || die "no such script: ${1:-(none given)}; there are: $(
    cd "$root" && printf '%s ' ./*GPTLike*.py | sed 's|\./||g')" 2
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
  if [[ "${1##*/}" == GPTLike-Base.py ]]; then
    [[ "${NUM_GPUS:-1}" == 1 ]] || die "GPTLike-Base.py trains in one process, NUM_GPUS=$NUM_GPUS: unset it" 2
    cmd=(python "$@")
  else
    [[ "$port" =~ ^[1-9][0-9]{0,4}$ && "$port" -le 65535 ]] || die "MASTER_PORT=$port is no port" 2
    devices=$(which_devices "$gpus")
    [[ -z "$devices" ]] || mapfile -t cmd <<< "$devices"
    cmd=(deepspeed --quiet "${cmd[@]}" --master_port "$port" "$@")
  fi
  printf '+'; printf ' %q' "${cmd[@]}"; echo
  if "$dry_run"; then return; fi
  [[ ! -x "$root/.venv/bin/python" ]] || export PATH="$root/.venv/bin:$PATH"
  command -v "${cmd[0]}" >/dev/null || die "no ${cmd[0]} here: run scripts/setup.sh first, or activate an environment"
  [[ "${CUDA_VISIBLE_DEVICES:-}" == "" || "$gpus" != 0 ]] ||
    die "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES, but nvidia-smi lists no GPU: unset it to run on CPU ranks"
  # The launcher, too, would guess the device, and warn of its guess; where an AMD GPU is, it finds that.
  [[ "$gpus" != 0 || -e /dev/kfd ]] || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
  if [[ "$gpus" == 0 ]]; then # glibc is to keep freed memory for the next tensors: a step is a fifth faster, or more
    export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1000000000000}"
  fi
  exec "${cmd[@]}"
}

main "$@"
