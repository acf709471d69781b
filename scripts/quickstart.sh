#!/usr/bin/env bash
# From a fresh machine to a trained model: set-up, check, ZeRO-2 training on all GPUs (or two CPU ranks), a plot, a sample of text.
# At most 10 minutes on two CPU cores, installation included; all that it writes is .venv and runs/quickstart.
# Usage: scripts/quickstart.sh [--dry_run] [TRAINING_FLAGS...]     as in: scripts/quickstart.sh --dataset sample --max_steps 50
# environment: PYTHON=python3, those of scripts/run_local.sh, and the Hugging Face Hub's (HF_ENDPOINT, HF_HUB_OFFLINE)
set -euo pipefail
die() { printf '%s: %s\n' "${0##*/}" "$1" >&2; exit "${2:-1}"; }

DRY_RUN=false
RUN=runs/quickstart

title() { printf '\n== %s (after %d s)\n' "$1" "$SECONDS"; }

run() {
  printf '+'; printf ' %q' "$@"; echo
  "$DRY_RUN" || "$@"
}

# Succeeds if the Hub sends one byte of WikiText-2 within 10 seconds, or if it is to be read from the local cache.
hub_answers() {
  local url=${HF_ENDPOINT:-https://huggingface.co}/datasets/Salesforce/wikitext/resolve/main
  url+=/wikitext-2-raw-v1/test-00000-of-00001.parquet
  [[ "${HF_HUB_OFFLINE:-0}" == 0 ]] || return 0
  URL=$url timeout 10 "${PYTHON:-python3}" -c 'import os, urllib.request as u
u.urlopen(u.Request(os.environ["URL"], headers={"Range": "bytes=0-0"}), timeout=8).close()' 2>/dev/null
}

main() {
  local flags=(--output_dir "$RUN" --overwrite) dataset="" steps=1000 word
  if [[ "${1:-}" == --dry_run ]]; then DRY_RUN=true; shift; fi
  for word in "$@"; do
    case "$word" in
      --output_dir* | --resume*) die "${word%%=*} does not go here: the quick start begins afresh in $RUN each time" 2 ;;
      --dataset*) dataset=given ;;
    esac
  done
  cd "$(dirname "${BASH_SOURCE[0]}")/.."

  title "set-up"
  run bash scripts/setup.sh requirements.txt
  export PATH="$PWD/.venv/bin:$PATH"

  title "environment"
  run bash scripts/check_env.sh || die "the environment is not fit for training: see the lines that begin with FAIL"

  title "training"
  if [[ -n "$dataset" ]]; then
    echo "data: as --dataset says"
  elif hub_answers; then
    echo "data: WikiText-2 from ${HF_ENDPOINT:-the Hugging Face Hub}"
  else
    echo "data: NOT WikiText-2, since ${HF_ENDPOINT:-the Hugging Face Hub} does not answer, but the small built-in SAMPLE of"
    echo "      Python's documentation. Its losses compare with no other. See --dataset and HF_ENDPOINT in the README."
    flags+=(--dataset sample)
    steps=300
  fi
  if nvidia-smi -L >/dev/null 2>&1; then
    echo "device: NVIDIA GPU, with the scripts' own model size"
    flags+=(--max_steps "$steps")
  else
    echo "device: no NVIDIA GPU, so two CPU ranks and a small model"
    export DS_ACCELERATOR=cpu # what DeepSpeed would find by itself, with a warning from each process
    flags+=(--n_layer 4 --n_head 4 --d_model 128 --block_size 128 --batch_size 4 --dropout 0)
    flags+=(--tokenizer bpe:4096 --lr 3e-3 --max_steps 750 --eval_interval 250 --save_interval 0)
    if grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
      echo "precision: bf16, for which this CPU has instructions"
      flags+=(--precision bf16)
    else
      echo "precision: fp32, since this CPU has no bf16 instructions (avx512_bf16, amx_bf16) and would be slower with it"
      flags+=(--precision fp32)
    fi
  fi

  local launch=(bash scripts/run_local.sh) # prints its command itself
  if "$DRY_RUN"; then launch+=(--dry_run); fi
  "${launch[@]}" DeepSpeed-GPTLike-ZeRO-2.py "${flags[@]}" "$@"

  title "plot"
  run python scripts/tools/compare_runs.py "$RUN" --output "$RUN"
  title "export to transformers, and a sample of text"
  run python scripts/tools/export_hf.py "$RUN" "$RUN/gpt2"
  run python scripts/tools/generate.py "$RUN/gpt2" --prompt "If the" --temperature 0.5 --top_k 20
  printf '\n== done in %d s: %s/loss.png, %s/model (weights), %s/gpt2 (the same for transformers)\n' \
    "$SECONDS" "$RUN" "$RUN" "$RUN"
}

main "$@"
