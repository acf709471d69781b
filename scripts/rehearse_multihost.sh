#!/usr/bin/env bash
# Two hosts on one Linux machine: two network namespaces with the tutorial's interface eno1 and addresses 172.25.0.100
# and 172.25.0.200, own host names, folders and caches, no shared disk. The tutorial's two torchrun commands run there.
# On CPU ranks, as root or through unprivileged user namespaces. All of it goes when this ends, also by Ctrl-C.
# Usage: scripts/rehearse_multihost.sh [--drill NAME] [--output DIR] [TRAINING_FLAGS...]
#   --drill   plain (default), host-missing, host-lost, split-disks, version-mismatch, elastic (a killed rank is
#             restarted), all
#   --output  keep the hosts' folders and logs there; without it they are deleted
set -euo pipefail
die() { printf '%s: %s\n' "${0##*/}" "$1" >&2; exit "${2:-1}"; }
DRILLS=(plain host-missing host-lost split-disks version-mismatch elastic)

# A host: a process that holds its own network, host name and, at the path that all hosts have, folder. Its PID comes
# back in REPLY.
make_host() {
  local name=$1 address=$2 folder=$3 outer
  outer=$(readlink /proc/self/ns/net)
  mkdir -p "$folder/$name" "$folder/host"
  unshare --net --uts --mount sleep infinity &
  REPLY=$!
  while [[ "$(readlink "/proc/$REPLY/ns/net")" == "$outer" ]]; do sleep 0.05; done
  nsenter -t "$REPLY" -u hostname "$name"
  nsenter -t "$REPLY" -m mount --bind "$folder/$name" "$folder/host"
  ip link set "to-$name" netns "$REPLY" name eno1
  nsenter -t "$REPLY" -n ip address add "$address/24" dev eno1
  nsenter -t "$REPLY" -n ip link set eno1 up
  nsenter -t "$REPLY" -n ip link set lo up
}

inside() {
  local folder=$1 python=$2 pids=()
  shift 2
  printf '127.0.0.1 localhost\n172.25.0.100 node0\n172.25.0.200 node1\n' > "$folder/hosts"
  mount --bind "$folder/hosts" /etc/hosts # in here only
  ip link add to-node0 type veth peer name to-node1
  make_host node0 172.25.0.100 "$folder"; pids+=("$REPLY")
  make_host node1 172.25.0.200 "$folder"; pids+=("$REPLY")
  "$python" "${BASH_SOURCE[0]%/*}/dev/rehearsal.py" --folder "$folder" --hosts "${pids[@]}" "$@"
}

main() {
  local root drills=(plain) folder="" python user=() tool
  if [[ "${1:-}" == --inside ]]; then shift; inside "$@"; return; fi
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  while [[ "${1:-}" == --drill || "${1:-}" == --output ]]; do
    [[ -n "${2:-}" ]] || die "$1 needs a value" 2
    if [[ "$1" == --output ]]; then folder=$2; else drills=("$2"); fi
    shift 2
  done
  [[ "${drills[0]}" != all ]] || drills=("${DRILLS[@]}")
  [[ " ${DRILLS[*]} " == *" ${drills[0]} "* ]] || die "no drill ${drills[0]}: write all or one of ${DRILLS[*]}" 2
  for tool in unshare nsenter taskset ip; do
    command -v "$tool" >/dev/null || die "no $tool: on Debian and Ubuntu, apt-get install util-linux iproute2"
  done
  python="$root/.venv/bin/python"
  [[ -x "$python" ]] || python=$(command -v python3) || die "no Python: run scripts/setup.sh first"
  "$python" -c 'import importlib.util as i, sys; sys.exit(not all(map(i.find_spec, ["psutil", "deepspeed"])))' ||
    die "$python has no deepspeed: run scripts/setup.sh first, or activate an environment that has it"
  [[ $EUID == 0 ]] || user=(--user --map-root-user)
  unshare "${user[@]}" --net --mount --pid --fork --mount-proc true 2>/dev/null ||
    die "no namespaces here: run it as root, or allow unprivileged ones (sysctl kernel.unprivileged_userns_clone=1, \
on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0)"
  [[ -z "$folder" ]] || folder=$(realpath -m -- "$folder")
  if [[ -z "$folder" ]]; then
    folder=$(mktemp -d)
    TEMPORARY=$folder
    trap 'rm -rf -- "$TEMPORARY"' EXIT
  fi
  mkdir -p "$folder" || die "cannot make $folder"
  [[ -z "$(ls -A "$folder")" ]] || die "$folder is not empty: name another --output" 2
  unshare "${user[@]}" --net --mount --pid --fork --mount-proc --kill-child \
    bash "${BASH_SOURCE[0]}" --inside "$folder" "$python" --drills "${drills[@]}" -- "$@"
}

main "$@"
