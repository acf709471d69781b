#!/usr/bin/env bash
# Start a training script on several hosts: this command on each of them, or with --launcher deepspeed on one for all.
# Usage: scripts/run_multihost.sh [--dry_run] [FLAGS] SCRIPT [SCRIPT_ARGS...]     other flags are for the launcher
#   --elastic             torchrun's c10d rendezvous; NNODES may be MIN:MAX, and --max-restarts N restarts the ranks
#   --launcher deepspeed  the hosts of --hostfile FILE (configs/hostfile), by pdsh; with --no_ssh each host starts its own
# environment: MASTER_ADDR (first host)   NODE_RANK=0,1,.. (this host)   NNODES=2   MASTER_PORT=29500   RDZV_ID=gptlike
#   GPUS_PER_HOST (ranks here: CUDA_VISIBLE_DEVICES or all GPUs, else 1)   RDZV_TIMEOUT=300 (seconds to wait for hosts)
set -euo pipefail
die() { printf '%s: %s\n' "${0##*/}" "$1" >&2; exit "${2:-1}"; }
need() { [[ "${!1}" =~ ^($2)$ ]] || die "$1=${!1}: write $3" 2; } # NAME PATTERN WORDS
choose() { # NAME VALUE WHY
  if [[ -v "$1" ]]; then echo "kept $1=${!1}, since it was set"; else export "$1=$2"; echo "chose $1=$2: $3"; fi
}

choose_network() { # the interface that leads to MASTER_ADDR
  local address route own
  read -r address _ < <(getent ahosts "$MASTER_ADDR") || die "MASTER_ADDR=$MASTER_ADDR does not resolve: write an address"
  [[ "$address" != 127.* || "$MASTER_ADDR" =~ ^(127\.|localhost$) ]] ||
    die "MASTER_ADDR=$MASTER_ADDR resolves to $address, which other hosts cannot reach: write its address"
  own=$(ip -o address show to "$address") || die "no ip here, which finds the interface: apt-get install iproute2"
  route=$(ip -o route get "$address" 2>&1) || die "no route to MASTER_ADDR=$MASTER_ADDR: $route"
  [[ -n "$own" || "$NODE_RANK" != 0 ]] || die "MASTER_ADDR=$MASTER_ADDR is not this host, but NODE_RANK=0 must be"
  IS_HOST=$([[ -n "$own" ]] && echo 1 || echo 0)
  [[ ! "$route" =~ \ src\ ([^ ]+) ]] || HERE=${BASH_REMATCH[1]}
  [[ "${own:-$route}" =~ ^[0-9]+:\ ([^ ]+)|\ dev\ ([^ ]+) ]] && route=${BASH_REMATCH[1]:-${BASH_REMATCH[2]}}
  choose NCCL_SOCKET_IFNAME "=$route" "it leads to $MASTER_ADDR" # NCCL: = is exact
  choose GLOO_SOCKET_IFNAME "$route" "it leads to $MASTER_ADDR"
  [[ -d /sys/class/infiniband ]] || choose NCCL_IB_DISABLE 1 "no InfiniBand in /sys/class/infiniband"
}

write_deepspeed_env() { # pdsh hands on NCCL* and PYTHON* only; DeepSpeed reads a file for the rest
  DS_ENV_FILE=$(mktemp) && exec 9<> "$DS_ENV_FILE" && rm "$DS_ENV_FILE" && export DS_ENV_FILE=/proc/self/fd/9
  { env | grep -E '^(NCCL_|GLOO_|HF_|MALLOC_)[A-Z_]*=[A-Za-z0-9_@+=:,./-]+$' | grep -v TOKEN
    cat "$HOME/.deepspeed_env" .deepspeed_env 2>/dev/null | grep -E '^[A-Za-z_]+='; } >&9 || :
}

main() {
  local dry_run=false mode launcher=torchrun kind="" hostfile=configs/hostfile words=() gpus ids=() cmd name
  : "${MASTER_ADDR:=}" "${MASTER_PORT:=29500}" "${NNODES:=2}" "${NODE_RANK:=}" "${RDZV_TIMEOUT:=300}"
  while [[ $# -gt 0 && "$1" != *.py ]]; do
    case "$1" in
      --dry_run) dry_run=true ;;
      --elastic) kind+=elastic ;;
      --no_ssh) kind+=no_ssh words+=(--no_ssh --node_rank "$NODE_RANK") ;;
      --launcher) launcher=${2:-}; shift ;;
      --hostfile) hostfile=${2:-}; shift ;;
      --launcher=* | --hostfile=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
      *) words+=("$1") ;;
    esac
    shift || die "the last flag needs a value" 2
  done
  [[ -f "${1:-}" ]] || die "no such script: ${1:-(none given)}" 2
  [[ "$launcher $kind" =~ ^(torchrun (elastic)?|deepspeed (no_ssh)?)$ ]] || die "launch by torchrun [--elastic] or deepspeed [--no_ssh]" 2
  mode=${kind:-$launcher}
  PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH" # where there is one
  IFS=, read -ra ids <<< "${CUDA_VISIBLE_DEVICES:-}"
  if [[ -v CUDA_VISIBLE_DEVICES ]]; then gpus=${#ids[@]}; else gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || :; fi
  : "${GPUS_PER_HOST:=$((gpus > 0 ? gpus : 1))}"
  for name in MASTER_PORT GPUS_PER_HOST RDZV_TIMEOUT; do need "$name" '[1-9][0-9]{0,4}' "a number"; done
  need NNODES "[1-9][0-9]{0,3}$([[ $mode != elastic ]] || echo '(:[1-9][0-9]{0,3})?')" "the number of hosts"
  [[ -z "$NODE_RANK" && "$mode" =~ ^(elastic|deepspeed)$ ]] || need NODE_RANK '0|[1-9][0-9]{0,3}' "0 on the first host"
  [[ "$mode" == deepspeed || "${NODE_RANK:-0}" -lt "${NNODES#*:}" ]] || die "NODE_RANK=$NODE_RANK, NNODES=$NNODES" 2
  if [[ "$mode" == deepspeed || "$mode" == no_ssh ]]; then
    [[ -f "$hostfile" ]] || die "no hostfile $hostfile: copy configs/hostfile.example there, with your hosts in it"
    [[ -z "${CUDA_VISIBLE_DEVICES:-}" ]] || die "deepspeed takes each host's first GPUs: unset CUDA_VISIBLE_DEVICES" 2
    MASTER_ADDR=${MASTER_ADDR:-$(sed -nE '/^[^# ]+ +slots=/{s/^(.*@)?([^ ]+) .*/\2/p;q}' "$hostfile")}
  fi
  need MASTER_ADDR '[A-Za-z0-9:][A-Za-z0-9._:-]*' "the first host's address, as in MASTER_ADDR=172.25.0.100"
  choose_network
  [[ "$gpus" != 0 ]] || # on CPUs glibc is to keep freed memory for the next tensors
    export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1000000000000}"
  cmd=(torchrun "--nnodes=$NNODES" "--nproc_per_node=$GPUS_PER_HOST")
  case "$mode" in # elastic: without --local_addr others get this host's name, which may not resolve
    torchrun) cmd+=("--node_rank=$NODE_RANK" "--master_addr=$MASTER_ADDR" "--master_port=$MASTER_PORT"
      "--rdzv_conf=timeout=$RDZV_TIMEOUT") ;;
    elastic) export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or a restart meets the addresses of dead ranks
      cmd+=(--rdzv_backend=c10d "--rdzv_endpoint=$MASTER_ADDR:$MASTER_PORT" "--rdzv_id=${RDZV_ID:-gptlike}"
      "--rdzv_conf=is_host=$IS_HOST,join_timeout=$RDZV_TIMEOUT,read_timeout=$RDZV_TIMEOUT" --local_addr="$HERE") ;;
    *) cmd=(deepspeed --hostfile "$hostfile" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT") ;;
  esac
  cmd+=("${words[@]}" "$@")
  printf '+'; printf ' %q' "${cmd[@]}"; echo
  if "$dry_run"; then return; fi
  command -v "${cmd[0]}" >/dev/null || die "no ${cmd[0]} here: run scripts/setup.sh first, or activate an environment"
  [[ "$mode" != deepspeed ]] || write_deepspeed_env
  echo "waiting for all hosts; scripts/tools/network_check.py says which one is missing"
  exec "${cmd[@]}"
}

main "$@"
