#!/usr/bin/env bash
# Make .venv here, install the packages of a requirements file, and compile DeepSpeed's C++ ops. What is done already is
# skipped, so that a second call takes seconds. quickstart.sh and test.sh call this.
# Usage: scripts/setup.sh [REQUIREMENTS_FILE]          environment: PYTHON=python3
set -euo pipefail
die() { printf '%s: %s\n' "${0##*/}" "$1" >&2; exit "${2:-1}"; }

make_venv() {
  local python=${PYTHON:-python3}
  .venv/bin/python -m pip --version >/dev/null 2>&1 && return
  command -v "$python" >/dev/null || die "no $python: install Python 3.11 or newer, or set PYTHON"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$("$python" -V) is too old, transformers 5 needs Python 3.11 or newer: set PYTHON=/path/to/python3.11"
  echo "making .venv with $("$python" -V)"
  [[ ! -e .venv || -f .venv/pyvenv.cfg ]] || die "$PWD/.venv is no virtual environment: move it out of the way"
  "$python" -m venv --clear .venv || die "cannot make .venv; on Debian and Ubuntu: apt-get install python3-venv"
}

stamp() { cksum requirements.txt "$1"; }

install_packages() {
  local file=$1
  if [[ "$(cat ".venv/installed-$file" 2>/dev/null)" == "$(stamp "$file")" ]]; then
    echo "packages of $file: installed"
    return
  fi
  echo "installing the packages of $file into .venv (minutes the first time)"
  # Python writes bytecode at the first import. Where it may not, as in many containers: now, but for a few templates.
  .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r "$file" ||
    die "pip could not install $file: its message is above"
  [[ -z "${PYTHONDONTWRITEBYTECODE:-}" ]] || .venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null || :
  stamp "$file" > ".venv/installed-$file"
  stamp requirements.txt > .venv/installed-requirements.txt # every other file includes this one
}

compile_ops() {
  if ! command -v c++ >/dev/null; then
    echo "no C++ compiler: DeepSpeed's ops are skipped, PyTorch's do their work. To have them, on Debian and Ubuntu:" \
      "apt-get install g++ python3-dev"
    return
  fi
  PATH="$PWD/.venv/bin:$PATH" .venv/bin/python scripts/tools/compile_ops.py # on the PATH for ninja
}

main() {
  local file=${1:-requirements.txt}
  [[ $# -le 1 ]] || die "one requirements file at a time, not $2" 2
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  [[ -f "$file" && "$file" == requirements*.txt ]] || die "no such requirements file: $file" 2
  make_venv
  install_packages "$file"
  compile_ops
}

main "$@"
