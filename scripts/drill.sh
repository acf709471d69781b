#!/usr/bin/env bash
# The fault drill: ranks are killed at random moments, and the run has to end as if nobody had. On CPU ranks.
# Usage: scripts/drill.sh [--kills N] [--scripts NAME...] [--seed S] [--output FILE.md]
#   --kills    of each script, 20 if left out      --scripts  some of Base ZeRO-1 ZeRO-2 ZeRO-3 Offload; all if left out
#   --seed     of the moments and the ranks        --output   write the table there, too
set -euo pipefail
die() { printf '%s: %s\n' "${0##*/}" "$1" >&2; exit "${2:-1}"; }

main() {
  local root python
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  python="$root/.venv/bin/python"
  [[ -x "$python" ]] || python=$(command -v python3) || die "no Python: run scripts/setup.sh first"
  "$python" -c 'import importlib.util as i, sys; sys.exit(not all(map(i.find_spec, ["psutil", "deepspeed"])))' ||
    die "$python has no deepspeed: run scripts/setup.sh first, or activate an environment that has it"
  exec "$python" "$root/scripts/drill.py" "$@"
}

main "$@"
