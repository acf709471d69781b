#!/usr/bin/env bash
# Start a training script on several hosts: this command on each of them, or with --launcher deepspeed on one for all.
# Usage: scripts/run_multihost.sh [FLAGS] [--] SCRIPT [SCRIPT_ARGS...]
#   --dry_run             print what would be set and run     --no_roll_call: where another host runs torchrun by hand
#   --elastic             c10d rendezvous; NNODES may be MIN:MAX; --max-restarts N: restart the ranks so often
#   --launcher deepspeed  the hosts and ranks of --hostfile FILE (configs/hostfile), started over ssh by pdsh, after
#                         --venv_script FILE is sourced there; with --no_ssh each host starts its own, as torchrun does
# environment: MASTER_ADDR (first host)   NODE_RANK=0,1,.. (this host)   NNODES=2   MASTER_PORT=29500   RDZV_ID=gptlike
#   GPUS_PER_HOST (ranks here: CUDA_VISIBLE_DEVICES or all GPUs, else 1)   RDZV_TIMEOUT=300 (seconds to wait for hosts)
# Example: MASTER_ADDR=172.25.0.100 NODE_RANK=0 scripts/run_multihost.sh DeepSpeed-GPTLike-Multihosts.py --epochs 1
set -euo pipefail
die() { printf '%s: %s\n' "${0##*/}" "$1" >&2; exit "${2:-1}"; }
hosts() { python3 -I "$ROOT/scripts/hosts.py" "$@"; }
number() {
  [[ "$2" =~ ^(0|[1-9][0-9]{0,4})$ && "$2" -ge $3 && "$2" -le $4 ]] || die "$1=$2 is no number from $3 to $4" 2
}

choose() {
  if [[ -v "$1" ]]; then echo "kept $1=${!1}, since it was set"; return; fi
  export "$1=$2"
  echo "chose $1=$2: $3"
}

choose_network() { # interfaces with commas; whether a host has InfiniBand; why
  choose NCCL_SOCKET_IFNAME "=$1" "$3"
  if [[ "$1" != *,* ]]; then choose GLOO_SOCKET_IFNAME "$1" "$3"; fi
  if [[ "$2" == no ]]; then choose NCCL_IB_DISABLE 1 "no InfiniBand device in /sys/class/infiniband"; fi
}

# Sets FLAG and SCRIPT_ARGS, and MODE: static and elastic are torchrun's, pdsh and no_ssh the deepspeed launcher's.
read_flags() {
  local name
  local -A goes_with=([elastic]=elastic [max-restarts]=elastic [hostfile]="pdsh no_ssh" [venv_script]=pdsh)
  while [[ "${1:-}" == -* ]]; do
    case "$1" in
      --) shift; break ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
      --dry_run | --no_roll_call | --elastic | --no_ssh) FLAG[${1#--}]=yes ;;
      --launcher | --hostfile | --venv_script | --max-restarts)
        [[ -n "${2:-}" ]] || die "$1 needs a value" 2; FLAG[${1#--}]=$2; shift ;;
      *) die "unknown flag $1; the training script's own flags come after its name" 2 ;;
    esac
    shift
  done
  case "${FLAG[launcher]:-torchrun} ${FLAG[no_ssh]:-}" in
    "torchrun ") [[ -n "${FLAG[elastic]:-}" ]] && MODE=elastic || MODE=static ;;
    "deepspeed ") MODE=pdsh ;;
    "deepspeed yes") MODE=no_ssh ;;
    *) die "--launcher is torchrun or deepspeed, and --no_ssh is for deepspeed only" 2 ;;
  esac
  for name in "${!FLAG[@]}"; do
    [[ " ${goes_with[$name]:-$MODE} " == *" $MODE "* ]] || die "--$name does not go with the $MODE launch" 2
  done
  [[ "${1:-}" == *.py && "$1" != -* && -f "$1" ]] || die "no such script: ${1:-(none given)}" 2
  SCRIPT_ARGS=("$@")
}

# pdsh hands words to the shells of the hosts without quotes.
prepare_pdsh() {
  local word answer iface infiniband versions
  [[ -z "${FLAG[venv_script]:-}" ]] || FLAG[venv_script]=$(realpath -sm -- "${FLAG[venv_script]}")
  for word in "$PWD" "${FLAG[venv_script]:-.}" "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_@+=:,./\ -]+$ && "$PWD${FLAG[venv_script]:-}$1" != *" "* ]] ||
      die "${word@Q}: with pdsh the shells of the hosts would change this; start with --no_ssh or torchrun" 2
  done
  if [[ -n "${FLAG[dry_run]:-}" ]]; then echo "not yet asked: the hosts, for interface and versions"; return; fi
  command -v pdsh >/dev/null || die "no pdsh here (Debian and Ubuntu: apt-get install pdsh), or start with --no_ssh"
  answer=$(hosts ask "$MASTER_ADDR" "$PORT" "$PWD" "$1" "${FLAG[venv_script]:-}" "$(command -v python)" "${HOSTS[@]}")
  read -r iface infiniband versions <<< "$answer" && echo "all hosts answer: $versions"
  choose_network "$iface" "$infiniband" "the hosts' own way to $MASTER_ADDR"
  [[ "$iface" != *,* ]] || echo "chose no GLOO_SOCKET_IFNAME: it is one name for all hosts, and theirs are $iface"
  answer=$(mktemp)
  exec 9<> "$answer" && rm "$answer" # DeepSpeed reads it through descriptor 9, and no file stays behind
  hosts deepspeed_env >&9
  export DS_ENV_FILE=/proc/self/fd/9
}

count_ranks() {
  local ids=()
  IFS=, read -ra ids <<< "${CUDA_VISIBLE_DEVICES:-}"
  [[ ${#ids[@]} != 0 || -v CUDA_VISIBLE_DEVICES ]] || mapfile -t ids < <(nvidia-smi -L 2>/dev/null | grep '^GPU ')
  ranks=${GPUS_PER_HOST:-$((${#ids[@]} ? ${#ids[@]} : 1))}
  number GPUS_PER_HOST "$ranks" 1 9999
}

# Without is_host torchrun looks whether its host's name resolves to MASTER_ADDR, without --local_addr the others get
# that name to reach rank 0; without read_timeout they give up after 60 s.
elastic_command() {
  local conf="join_timeout=$limit,read_timeout=$limit" id=${RDZV_ID:-gptlike}
  [[ "$id" =~ ^[A-Za-z0-9._-]+$ ]] || die "RDZV_ID=$id: write letters, digits, dots, dashes" 2
  [[ -n "$rank" || "$address" =~ ^(127\.|::1$) ]] || rank=$([[ "$own" == yes ]] && echo 0 || echo 1)
  [[ -z "$rank" ]] || conf="is_host=$((rank == 0)),$conf"
  cmd=(torchrun "--nnodes=$nodes" "--nproc_per_node=$ranks" --rdzv_backend=c10d "--rdzv_endpoint=$MASTER_ADDR:$PORT"
    "--rdzv_id=$id" "--rdzv_conf=$conf" "--local_addr=$from"
    ${FLAG[max-restarts]:+"--max-restarts=${FLAG[max-restarts]}"})
  number --max-restarts "${FLAG[max-restarts]:-0}" 0 9999
  nodes=0 # no roll call: hosts come and go
}

main() {
  local ROOT MODE SCRIPT_ARGS HOSTS PORT=${MASTER_PORT:-29500} nodes=${NNODES:-2} rank=${NODE_RANK:-}
  local way own iface from infiniband address lines plan="NNODES=$nodes" ranks limit=${RDZV_TIMEOUT:-300} cmd
  local -A FLAG=()
  ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  read_flags "$@"
  [[ ! -x "$ROOT/.venv/bin/python" ]] || export PATH="$ROOT/.venv/bin:$PATH"
  number MASTER_PORT "$PORT" 1 65535
  number RDZV_TIMEOUT "$limit" 1 99999
  if [[ "$MODE" == pdsh || "$MODE" == no_ssh ]]; then
    [[ -z "${CUDA_VISIBLE_DEVICES:-}" ]] || die "the deepspeed launcher takes the first GPUs of each host, as many as \
slots, and ignores CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: unset it, or start with torchrun" 2
    way=$(hosts hostfile "${FLAG[hostfile]:=configs/hostfile}")
    mapfile -t lines <<< "$way"
    HOSTS=("${lines[@]%% *}")
    nodes=${#HOSTS[@]}
    [[ "${NNODES:-$nodes}" == "$nodes" ]] || die "NNODES=$NNODES, but ${FLAG[hostfile]} names $nodes hosts" 2
    MASTER_ADDR=${MASTER_ADDR:-${HOSTS[0]#*@}} plan="hosts ${lines[*]}" ranks="as the hostfile says"
  else
    [[ "$MODE" == elastic ]] || number NNODES "$nodes" 1 9999 # no range
    number NNODES "${nodes%%:*}" 1 9999 && number NNODES "${nodes#*:}" "${nodes%%:*}" 9999
    count_ranks
  fi
  [[ "$MODE" == pdsh || "$MODE$rank" == elastic ]] || number NODE_RANK "$rank" 0 "$((${nodes#*:} - 1))"
  [[ "${MASTER_ADDR:-}" =~ ^[A-Za-z0-9:][A-Za-z0-9._:-]*$ ]] ||
    die "MASTER_ADDR=${MASTER_ADDR:-} is no address: write the first host's, as in MASTER_ADDR=172.25.0.100" 2
  if [[ "$MODE" == pdsh ]]; then prepare_pdsh "${SCRIPT_ARGS[@]}"; else
    way=$(hosts survey "$MASTER_ADDR")
    read -r own iface from infiniband address <<< "$way"
    [[ "$own$rank" != no0 ]] || die "MASTER_ADDR=$MASTER_ADDR is not this host ($from), but NODE_RANK=0 must be"
    choose_network "$iface" "$infiniband" "it leads to $MASTER_ADDR"
  fi
  case "$MODE" in
    static) cmd=(torchrun "--nnodes=$nodes" "--nproc_per_node=$ranks" "--node_rank=$rank" "--master_addr=$MASTER_ADDR"
      "--master_port=$PORT" ${FLAG[no_roll_call]:+"--rdzv_conf=timeout=$limit"}) ;;
    elastic) elastic_command ;;
    pdsh) cmd=(deepspeed --hostfile "${FLAG[hostfile]}" --master_addr "$MASTER_ADDR" --master_port "$PORT"
      ${FLAG[venv_script]:+--venv_script "${FLAG[venv_script]}"}) ;;
    no_ssh) cmd=(deepspeed --hostfile "${FLAG[hostfile]}" --no_ssh --node_rank "$rank" --master_addr "$MASTER_ADDR"
      --master_port "$PORT") ;;
  esac
  cmd+=("${SCRIPT_ARGS[@]}")
  printf '+'; printf ' %q' "${cmd[@]}"; echo
  [[ -z "${FLAG[dry_run]:-}" ]] || return 0
  command -v "${cmd[0]}" >/dev/null || die "no ${cmd[0]} here: run scripts/setup.sh first, or activate an environment"
  [[ "$MODE" == pdsh || -n "${FLAG[no_roll_call]:-}" || -z "$rank" ]] || cmd=(python3 -I "$ROOT/scripts/hosts.py"
    roll_call "$address" "$PORT" "$rank" "$nodes" "$plan" "$ranks" "$limit" "${cmd[@]}")
  exec "${cmd[@]}"
}

main "$@"
