#!/usr/bin/env bash
# From a fresh machine to a green test suite: set-up, ruff, its format, shellcheck, the scripts' shared regions, pytest.
# Usage: scripts/test.sh [--fast|--all] [PYTEST_ARGS...]
#   --fast  unit tests, no training runs     --all  everything     neither: all but the long drills
#   Long options of pytest come after one of these or after --, as in: scripts/test.sh -- --lf
#   Unit tests run on all cores, training runs two files at a time: -n 0 for one after the other.
set -euo pipefail
die() { printf '%s: %s\n' "${0##*/}" "$1" >&2; exit "${2:-1}"; }

part() {
  local name=$1 start=$SECONDS status=0
  shift
  printf '+'; printf ' %q' "$@"; echo
  "$@" || status=$?
  printf '  %s: %s, %d s\n' "$name" "$([[ $status == 0 ]] && echo ok || echo "FAILED ($status)")" "$((SECONDS - start))"
  return "$status"
}

# A half in which PYTEST_ARGS leave nothing to run is no failure, but both are.
tests() {
  local status=0
  pytest -m "$@" || status=$?
  [[ "$status" == 5 ]] || { matched=true; return "$status"; }
}

main() {
  local matched=false units="not slow and not drill" runs="slow and not drill" failed=()
  case "${1:-}" in
    --fast) runs=""; shift ;;
    --all) runs="slow or drill"; shift ;;
    --) shift ;;
    --*) die "unknown flag $1: write --fast, --all or --, and after it what pytest is to get" 2 ;;
  esac
  [[ "${1:-}" != --fast && "${1:-}" != --all ]] || die "--fast and --all: one at a time" 2
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  unset PYTHONDONTWRITEBYTECODE # or each process would compile its imports again
  part set-up bash scripts/setup.sh requirements-dev.txt || die "set-up failed"
  export PATH="$PWD/.venv/bin:$PATH"
  part ruff ruff check . || failed+=(ruff)
  part format ruff format --check . || failed+=(format)
  part shellcheck shellcheck scripts/*.sh .ci/run || failed+=(shellcheck)
  part regions python scripts/dev/sync_regions.py || failed+=(regions)
  part "unit tests" tests "$units" --numprocesses logical --maxprocesses 8 "$@" || failed+=("unit tests")
  [[ -z "$runs" ]] || part "training runs" tests "$runs" --numprocesses 2 --dist loadfile "$@" || failed+=("training runs")
  "$matched" || failed+=("no test matches $*")
  printf 'all parts: %d s\n' "$SECONDS"
  [[ ${#failed[@]} == 0 ]] || die "failed: ${failed[*]}"
}

main "$@"
