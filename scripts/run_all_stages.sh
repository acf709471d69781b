#!/usr/bin/env bash
# The tutorial in one command: train Base and every stage of ZeRO briefly on the same data, then compare them.
# On all GPUs, or on two CPU ranks with a small model. --dataset sample, which works offline, unless another is given.
# Writes runs/all-stages: a folder for each script, compare.md and its pictures. A run that is finished is not trained
# again, one that was cut off continues; --overwrite starts all of them afresh.
# Usage: scripts/run_all_stages.sh [--dry_run] [TRAINING_FLAGS...]     as in: scripts/run_all_stages.sh --max_steps 500
# --batch_size is that of a ZeRO rank; Base gets as many times more as there are ranks, so that all see the same steps.
# environment: that of scripts/run_local.sh
set -euo pipefail
die() { printf '%s: %s\n' "${0##*/}" "$1" >&2; exit "${2:-1}"; }

RUNS=runs/all-stages
SCRIPTS=(GPTLike-Base.py DeepSpeed-GPTLike-ZeRO-1.py DeepSpeed-GPTLike-ZeRO-2.py DeepSpeed-GPTLike-ZeRO-3.py
  DeepSpeed-GPTLike-ZeRO-Offload.py DeepSpeed-GPTLike-Multihosts.py)

# How many ranks run_local.sh will start.
count_ranks() {
  local gpus visible=${CUDA_VISIBLE_DEVICES:-}
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
  if [[ -n "${NUM_GPUS:-}" ]]; then
    echo "$NUM_GPUS"
  elif [[ -n "$visible" ]]; then
    tr ',' '\n' <<< "$visible" | grep -c .
  elif [[ "$gpus" != 0 ]]; then
    echo "$gpus"
  else
    echo 2
  fi
}

main() {
  local dry=() flags=(--dataset sample --dropout 0 --max_steps 200 --eval_interval 50) words=() micro=4 ranks
  local precision=fp32 script folders=() number=0 batch gpus
  if [[ "${1:-}" == --dry_run ]]; then dry=(--dry_run); shift; fi
  while (($#)); do
    case "$1" in
      --output_dir* | --resume* | --ds_config*) die "${1%%=*} does not go here: each script has its own" 2 ;;
      --batch_size=*) micro=${1#*=} ;;
      --batch_size) micro=${2:-}; shift "$(($# > 1))" ;;
      *) words+=("$1") ;;
    esac
    shift
  done
  [[ "$micro" =~ ^[1-9][0-9]{0,5}$ ]] || die "--batch_size '$micro' is no number of sequences" 2
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  ranks=$(count_ranks)
  [[ "$ranks" =~ ^[1-9][0-9]{0,3}$ ]] || die "NUM_GPUS=$ranks is not a number of ranks" 2
  if ! nvidia-smi -L >/dev/null 2>&1; then
    export DS_ACCELERATOR=cpu # what DeepSpeed would find by itself, with a warning from each process
    if grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then precision=bf16; fi
    flags+=(--n_layer 4 --n_head 4 --d_model 128 --block_size 128 --tokenizer bpe:4096 --lr 3e-3)
    flags+=(--precision "$precision")
  fi

  for script in "${SCRIPTS[@]}"; do
    folders+=("$RUNS/${script%.py}")
    printf '\n== %s of %s: %s (after %d s)\n' "$((++number))" "${#SCRIPTS[@]}" "$script" "$SECONDS"
    batch=$micro gpus=${NUM_GPUS:-}
    if [[ "$script" == GPTLike-Base.py ]]; then batch=$((micro * ranks)) gpus=; fi
    NUM_GPUS=$gpus bash scripts/run_local.sh "${dry[@]}" "$script" --output_dir "$RUNS/${script%.py}" \
      "${flags[@]}" --batch_size "$batch" "${words[@]}"
  done

  printf '\n== comparison (after %d s)\n' "$SECONDS"
  [[ ! -x .venv/bin/python ]] || export PATH="$PWD/.venv/bin:$PATH"
  local compare=(python scripts/compare_runs.py "${folders[@]}" --output "$RUNS")
  printf '+'; printf ' %q' "${compare[@]}"; echo
  [[ -n "${dry[*]}" ]] || "${compare[@]}"
}

main "$@"
