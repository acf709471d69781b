#!/usr/bin/env bash
# Check the six scripts on this machine's NVIDIA GPUs, and write docs/gpu-NAME.md, NAME being the card's.
# Usage: scripts/gpu_check.sh [--dry_run] [--parts PART...] [--peak_tflops N] [--output FILE.md]
#   --dry_run      a rehearsal at tiny size on the CPU: it runs every part and measures nothing about GPUs
#   --parts        some of scripts parity ledger offload nvme speed; all if left out
#   --peak_tflops  of one card in bf16, for MFU where the scripts do not know the card
set -euo pipefail
die() { printf '%s: %s\n' "${0##*/}" "$1" >&2; exit "${2:-1}"; }

main() {
  local root python
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  python="$root/.venv/bin/python"
  [[ -x "$python" ]] || python=$(command -v python3) || die "no Python: run scripts/setup.sh first"
  "$python" -c 'import importlib.util as i, sys; sys.exit(not all(map(i.find_spec, ["torch", "deepspeed"])))' ||
    die "$python has no deepspeed: run scripts/setup.sh first, or activate an environment that has it"
  exec "$python" "$root/scripts/gpu_check.py" "$@"
}

main "$@"
