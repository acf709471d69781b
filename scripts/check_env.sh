#!/usr/bin/env bash
# Can this host train, and do several hosts fit together? Prints the tutorial's five lines, then one verdict a line:
# ok|warn|FAIL  name  found  wanted  fix. Exit 0: fine, warn allowed; 1: a FAIL, no training; 2: wrong usage.
# Usage: scripts/check_env.sh [--json]                       this host; also ssh HOST bash -s < scripts/check_env.sh
#        scripts/check_env.sh [--json] --host USER@HOST...   and these over ssh, and their versions against those here
#        scripts/check_env.sh [--json] --peer HOST:PORT [--listen PORT]   a port both ways; start it on both hosts
#        scripts/check_env.sh [--json] --allreduce           GB/s of a real all-reduce; start it on every host
#   --timeout SECONDS  of --peer (60), --allreduce (120) or each host of --host (120)
# environment: PYTHON=python3   MASTER_ADDR   MASTER_PORT=29500   SSH_OPTIONS="-p 2222 -i KEY" (words, for --host)
#   on the hosts of --host: PYTHON as set there, else the same path as here, else python3
#   NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NO_PROXY HF_ENDPOINT HF_HUB_OFFLINE NO_COLOR as elsewhere
#   --allreduce: NNODES NODE_RANK (or torchrun's WORLD_SIZE RANK) GPUS_PER_HOST=1; none of them: all GPUs or 2 CPU ranks
set -euo pipefail
die() { printf 'check_env.sh: %s\n' "$1" >&2; exit "${2:-1}"; }

export LC_ALL=C # the tools' messages in English, and one byte a character
SELF=${BASH_SOURCE[0]:-} SYS=${CHECK_ENV_ROOT:-} US=$'\x1f' ROOT="" PY="" # CHECK_ENV_ROOT: tests' own /proc and /sys
JSON=false COLOUR=false FAILED=false TIMEOUT="" PEER_HOST="" PEER_PORT="" LISTEN="" HOST_NAME=$HOSTNAME
GPUS=0 GPU_NAMES="" NVCC="" MASTER="" MASTER_HERE=false LINES_OUT=() ROWS=() HOSTS=()
declare -A FACT=() PIN=()

# --- helpers; what they give back is left in REPLY ---

clean() { # printable ASCII and single spaces: no value can break a column, the JSON or the terminal
  local text=${1//[[:space:]]/ } words=()
  read -ra words <<< "${text//[^ -~]/?}" || :
  REPLY=${words[*]:-}
}

add() { # VERDICT NAME FOUND WANTED [FIX]; the fix is dropped where all is well
  local row=$1 field
  for field in "$2" "$3" "$4"; do clean "${field:0:300}"; row+=$US${REPLY:--}; done
  clean "${5:-}"
  [[ $1 != ok ]] || REPLY=""
  ROWS+=("$row$US$REPLY")
  [[ $1 != FAIL ]] || FAILED=true
}

grade() { # FOUND WARN_BELOW FAIL_BELOW
  REPLY=ok
  (($1 >= $2)) || REPLY=warn
  (($1 >= $3)) || REPLY=FAIL
}

limited() { # SECONDS COMMAND...: where there is a `timeout`
  local seconds=$1
  shift
  if command -v timeout >/dev/null; then timeout -k 10 "$seconds" "$@"; else "$@"; fi
}

number() { # an IPv4 address as a number
  local part
  [[ $1 =~ ^([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})$ ]] || return 1
  REPLY=0
  for part in "${BASH_REMATCH[@]:1}"; do
    ((10#$part < 256)) || return 1
    REPLY=$((REPLY * 256 + 10#$part))
  done
}

inside() { # ADDRESS NETWORK[/BITS]
  local bits=32 address
  [[ $2 != */* ]] || bits=${2#*/}
  [[ $bits =~ ^[0-9]{1,2}$ ]] && ((10#$bits <= 32)) && number "$1" || return 1
  address=$REPLY
  number "${2%/*}" && ((address >> (32 - 10#$bits) == REPLY >> (32 - 10#$bits)))
}

valid_host() { [[ $1 =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ || $1 =~ ^[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*$ ]]; }
valid_login() { [[ $1 != *@* || $1 =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*@[^@]+$ ]] && valid_host "${1##*@}"; }
valid_port() { [[ $1 =~ ^[0-9]{1,5}$ ]] && ((10#$1 >= 1 && 10#$1 <= 65535)); }

resolve() { # the address of a host name, or the address itself
  REPLY=$1
  [[ $1 =~ ^[0-9.]+$ || $1 == *:* ]] && return
  REPLY=$(limited 5 getent ahostsv4 "$1" 2>/dev/null || limited 5 getent ahosts "$1" 2>/dev/null) || return 1
  REPLY=${REPLY%%[[:space:]]*}
}

gib() { REPLY="$(($1 / 1048576)).$(($1 % 1048576 * 10 / 1048576)) GiB"; } # of KiB

space() { # SIZE and FREE of the file system of a folder, in KiB
  SIZE="" FREE=""
  { read -r _; read -r _ SIZE _ FREE _; } < <(limited 10 df -Pk "$1" 2>/dev/null) || :
  [[ $SIZE =~ ^[0-9]{1,15}$ && $FREE =~ ^[0-9]{1,15}$ ]]
}

listening() { # PORT: whether anything on this host listens there; read in /proc, so that it needs no tool
  local hex file address state
  printf -v hex '%04X' "$((10#$1))"
  for file in "$SYS/proc/net/tcp" "$SYS/proc/net/tcp6"; do
    [[ -r $file ]] || continue
    while read -r _ address _ state _; do
      [[ $address != *":$hex" || $state != 0A ]] || return 0
    done < "$file"
  done
  return 1
}

knock() { # HOST PORT: connect by bash alone; what the other side says, or why there is no connection
  local status=0
  # shellcheck disable=SC2016 # expanded by the inner bash
  REPLY=$(limited 3 bash -c 'exec 3<>"/dev/tcp/$0/$1" && printf "check_env -\n" >&3 && read -rt 1 line <&3
    echo "${line:-}"' "$1" "$2" 2>&1 < /dev/null) || status=$?
  case "$status $REPLY" in
    124* | 137* | *"timed out"*) REPLY="no answer (timed out)" ;;
    *refused*) REPLY=refused ;;
    *"/dev/tcp/"* | [1-9]*) REPLY=${REPLY##*: } ;;
    *) return 0 ;;
  esac
  return 1
}

# --- what is asked once ---

find_python() { # .venv of the repository; else PYTHON, and no other in its place; else what there is
  local name
  ROOT=$PWD
  if [[ -f $SELF ]]; then ROOT=$(cd "$([[ $SELF == */* ]] && echo "${SELF%/*}" || echo .)/.." && pwd); fi
  [[ -f "$ROOT/scripts/check_env.sh" ]] || ROOT="" # a copy elsewhere, or from stdin in another folder
  for name in "${ROOT:+$ROOT/.venv/bin/python}" "${PYTHON:-}" "${CHECK_ENV_PYTHON:-}" python3 python; do
    if [[ -n $name ]] && PY=$(command -v -- "$name"); then return; fi
    [[ -z ${PYTHON:-} || $name != "$PYTHON" ]] || break
  done
  PY=""
}

read_pins() { # of requirements.txt beside the script, or those that --host sends along
  local line lines=${CHECK_ENV_PINS:-}
  [[ -z $ROOT || ! -r "$ROOT/requirements.txt" ]] || lines=$(< "$ROOT/requirements.txt")
  while read -r line; do
    [[ ! $line =~ ^(torch|deepspeed|transformers|datasets)==([A-Za-z0-9.]+)$ ]] ||
      PIN[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
  done <<< "${lines//,/$'\n'}"
}

ask_python() { # FACT, without importing deepspeed, which takes seconds
  local key value
  [[ -n $PY ]] || return 0
  while IFS='=' read -r key value; do
    [[ ! $key =~ ^[a-z_]+$ ]] || FACT[$key]=$value
  done < <(limited 60 "$PY" - 2>/dev/null << 'PROBE'
import glob, os, sys, sysconfig
def say(key, value):
    print("%s=%s" % (key, " ".join(str(value).split())))
say("python", "%d.%d.%d" % sys.version_info[:3])
say("headers", os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))
try:
    from importlib import metadata
    for name in "torch", "deepspeed", "transformers", "datasets":
        try:
            say(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            pass
    import torch
    say("torch", torch.__version__)
    say("cuda", torch.version.cuda or "none")
    say("gpus", torch.cuda.device_count())
    say("available", torch.cuda.is_available())
    ops = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not ops:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        kind = "cu" + torch.version.cuda.replace(".", "") if torch.version.cuda else "cpu"
        ops = os.path.join(cache, "torch_extensions", "py%d%d_%s" % (sys.version_info[:2] + (kind,)))
    say("ops", " ".join(sorted(os.path.basename(path)[:-3] for path in glob.glob(ops + "/*/*.so"))))
    say("locks", " ".join(sorted(glob.glob(ops + "/*/lock"))))
    if torch.version.cuda:
        from torch.cuda import nccl
        say("nccl", ".".join(map(str, nccl.version())))
except (ImportError, OSError, RuntimeError, AttributeError, ValueError) as error:
    say("error", "%s: %s" % (type(error).__name__, error))
PROBE
  )
}

ask_nvidia_smi() { # GPUS, GPU_NAMES (one a line), FACT[smi]: why it fails
  local text status=0 line
  command -v nvidia-smi >/dev/null || return 0
  text=$(limited 20 nvidia-smi -L 2>&1) || status=$?
  while read -r line; do
    [[ $line =~ ^GPU\ [0-9]+:\ (.*)$ ]] || continue
    line=${BASH_REMATCH[1]}
    GPUS=$((GPUS + 1)) GPU_NAMES+=${line%% (UUID*}$'\n'
  done <<< "$text"
  [[ $GPUS != 0 || $status == 0 || $status == 6 ]] || FACT[smi]="exit $status: ${text##*$'\n'}" # 6: there is no device
}

ask_nvcc() { # NVCC: its line with the release
  local name text
  for name in ${CUDA_HOME:+"$CUDA_HOME/bin/nvcc"} nvcc /usr/local/cuda/bin/nvcc; do
    text=$(limited 20 "$name" --version 2>/dev/null) || continue
    [[ ! $text =~ [^$'\n']*release[^$'\n']* ]] || { NVCC=${BASH_REMATCH[0]}; return; }
  done
}

# --- the checks, one function each ---

check_gpus() {
  local name last="" count=0 text="" vendor
  if [[ -n ${FACT[smi]:-} ]]; then
    add FAIL GPUs "nvidia-smi fails, ${FACT[smi]}" "a driver that answers" \
      "reboot after an update of the driver, else install it again (sudo dmesg | grep -i nvrm)"
  elif [[ $GPUS == 0 && ${FACT[gpus]:-0} != 0 ]]; then
    add ok GPUs "${FACT[gpus]}, as torch says" any
  elif [[ $GPUS == 0 ]]; then
    text=none
    for vendor in "$SYS"/sys/bus/pci/devices/*/vendor; do
      [[ ! -r $vendor || $(< "$vendor") != 0x10de || $(< "${vendor%vendor}class") != 0x03* ]] ||
        text="an NVIDIA GPU without a driver"
    done
    command -v nvidia-smi >/dev/null || text+=" (no nvidia-smi)"
    add warn GPUs "$text" "an NVIDIA GPU" "training works on CPU ranks, slowly; with a GPU, install its driver"
  else
    while read -r name; do
      if [[ $name == "$last" || $count == 0 ]]; then count=$((count + 1)); else text+="$count x $last, " count=1; fi
      last=$name
    done <<< "${GPU_NAMES%$'\n'}"
    add ok GPUs "$text$count x $last" any
  fi
}

check_driver() {
  local driver need=450 cuda=${FACT[cuda]:-none}
  [[ $GPUS != 0 ]] || return 0
  driver=$(limited 20 nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || driver=""
  driver=${driver%%$'\n'*}
  [[ $driver =~ ^[0-9]+(\.[0-9]+)*$ ]] || { add warn "GPU driver" "not known" any nvidia-smi; return; }
  case $cuda in 12.*) need=525 ;; 13.*) need=580 ;; esac # NVIDIA: minor version compatibility
  grade "10#${driver%%.*}" "$need" "$need"
  add "$REPLY" "GPU driver" "$driver" ">= $need for CUDA $cuda" "update the driver, or take a torch for an older CUDA"
}

check_python() {
  local found=${FACT[python]:-} rest fix="install Python 3.11 or newer, set PYTHON, or run scripts/setup.sh"
  if [[ -z $found ]]; then
    add FAIL Python "none${PY:+: $PY does not run}" ">= 3.11" "$fix"
    PY=""
    return
  fi
  rest=${found#*.}
  grade "$((${found%%.*} * 1000 + ${rest%%.*}))" 3011 3011
  add "$REPLY" Python "$found ($PY)" ">= 3.11" "$fix"
}

check_torch_cuda() {
  local cuda=${FACT[cuda]:-none} name="torch's CUDA"
  if [[ -z ${FACT[available]:-} ]]; then
    add warn "$name" "not known" any "see torch"
  elif [[ $GPUS == 0 || ${FACT[available]} == True ]]; then
    add ok "$name" "$cuda" any
  elif [[ $cuda == none ]]; then
    add FAIL "$name" none "CUDA, for $GPUS GPUs" "this torch is for CPUs: install the one for your CUDA"
  elif [[ ${CUDA_VISIBLE_DEVICES-unset} =~ ^(-1)?$ ]]; then
    add warn "$name" "$cuda, GPUs hidden" "GPUs to be seen" "unset CUDA_VISIBLE_DEVICES"
  else
    add FAIL "$name" "$cuda, torch sees no GPU" "torch.cuda.is_available()" "driver too old, or no /dev/nvidia* in here"
  fi
}

check_package() { # NAME VERDICT_IF_MISSING WHO_NEEDS_IT
  local name=$1 found=${FACT[$1]:-} wanted=${PIN[$1]:-any} verdict=ok
  if [[ -z $PY ]]; then
    add warn "$name" "not known (no Python)" "$wanted" "see Python"
  elif [[ -z $found ]]; then
    add "$2" "$name" none "$wanted" "pip install $name${PIN[$name]:+==$wanted} ($3 needs it)"
  elif [[ $name == torch && -z ${FACT[available]:-} ]]; then
    add FAIL torch "$found does not import: ${FACT[error]:-crash, or over 60 s}" "$wanted" "install torch again"
  else
    [[ $wanted == any || ${found%%+*} == "$wanted" ]] || verdict=warn
    add "$verdict" "$name" "$found" "$wanted" "tested with $wanted only: pip install $name==$wanted"
  fi
}

check_nccl() {
  local found=${FACT[nccl]:-none}
  if [[ -z ${FACT[available]:-} ]]; then add warn NCCL "not known" any "see torch"
  elif [[ $GPUS == 0 ]]; then add ok NCCL "$found" "none without a GPU"
  elif [[ $found == none ]]; then add FAIL NCCL none "NCCL, for GPUs" "install the torch for your CUDA"
  else add ok NCCL "$found" any; fi
}

check_toolkit() {
  local cuda=${FACT[cuda]:-none} nvcc="" verdict=warn
  [[ ! $NVCC =~ release\ ([0-9]+\.[0-9]+) ]] || nvcc=${BASH_REMATCH[1]}
  nvcc=${nvcc:-none (no nvcc)}
  [[ $GPUS != 0 || $cuda != none ]] || { add ok "CUDA toolkit" "$nvcc" "none without a GPU"; return; }
  # DeepSpeed compiles its ops with another minor version up to CUDA 12, and no longer from 13 on.
  [[ $nvcc != "$cuda" && ($nvcc != 1[12].* || ${nvcc%.*} != "${cuda%.*}") ]] || verdict=ok
  add "$verdict" "CUDA toolkit" "$nvcc" "$cuda, as torch" \
    "DeepSpeed's Adam does not compile, PyTorch's is taken: install that toolkit, set CUDA_HOME"
}

check_compiler() {
  local name found=""
  for name in c++ g++; do
    found=$(limited 10 "$name" -dumpfullversion -dumpversion 2>/dev/null) && break
  done
  if [[ ! $found =~ ^[0-9]+ ]]; then found=none REPLY=warn; else grade "10#${BASH_REMATCH[0]}" 9 0; fi
  [[ ${FACT[headers]:-True} == True ]] || { REPLY=warn; found+=", no Python.h"; }
  add "$REPLY" g++ "$found" ">= 9, Python.h" \
    "DeepSpeed's ops do not compile, PyTorch's are taken: apt-get install g++ python3-dev"
}

check_ninja() {
  local mine="" path=""
  [[ -z $PY ]] || mine=$(limited 10 "${PY%/*}/ninja" --version 2>/dev/null) || mine=""
  path=$(limited 10 ninja --version 2>/dev/null) || path=""
  if [[ -z $mine$path ]]; then
    add warn ninja none any "DeepSpeed's ops do not compile: pip install ninja, and activate the environment"
  elif [[ -n $mine && -n $path && $mine != "$path" ]]; then
    add warn ninja "$mine beside Python, $path on the PATH" "one version" \
      "they take turns and compile anew each time: activate the environment"
  else
    add ok ninja "${mine:-$path}" any
  fi
}

check_libaio() {
  local folder found=none verdict=warn
  for folder in /usr /usr/local "${CONDA_PREFIX:-}"; do
    [[ ! -f $SYS$folder/include/libaio.h ]] || found=$folder/include/libaio.h verdict=ok
  done
  add "$verdict" libaio "$found" libaio.h "only offload to NVMe needs it: apt-get install libaio-dev"
}

check_ops() {
  local verdict=warn
  [[ -n ${FACT[ops]+known} ]] || return 0
  [[ " ${FACT[ops]} " != *" cpu_adam "* ]] || verdict=ok
  if [[ -n ${FACT[locks]:-} ]]; then
    add warn "compiled ops" "locked: ${FACT[locks]}" "no lock" "delete it, if nothing compiles now: runs wait for it"
  else
    add "$verdict" "compiled ops" "${FACT[ops]:-none}" cpu_adam "a minute at the first offload, or scripts/setup.sh"
  fi
}

cgroup_limit() { # the smallest memory limit, in KiB, of the cgroups (v1 or v2) that this process is in; or nothing
  local controllers path base name value least=""
  while IFS=: read -r _ controllers path; do
    case $controllers in
      "") base=$SYS/sys/fs/cgroup name=memory.max ;;
      *memory*) base=$SYS/sys/fs/cgroup/memory name=memory.limit_in_bytes ;;
      *) continue ;;
    esac
    while :; do # a parent's limit binds too; in a container the path may be the host's, and the root counts
      if [[ -r $base$path/$name ]] && read -r value < "$base$path/$name" && [[ $value =~ ^[0-9]{1,15}$ ]]; then
        [[ -n $least ]] && ((least <= value / 1024)) || least=$((value / 1024))
      fi
      [[ -n $path ]] || break
      path=${path%/*}
    done
  done < "$SYS/proc/self/cgroup"
  REPLY=$least
}

check_memory() {
  local key value total=0 available=0 limit="" found fix="fewer ranks, a smaller model, no offload to the CPU"
  [[ -r $SYS/proc/meminfo ]] || { add warn memory "not known" ">= 8 GiB" "free -h"; return; }
  while read -r key value _; do
    case $key in MemTotal:) total=$value ;; MemAvailable:) available=$value ;; esac
  done < "$SYS/proc/meminfo"
  gib "$available"; found=$REPLY
  gib "$total"; found+=" free of $REPLY, cgroup limit "
  cgroup_limit 2>/dev/null && limit=$REPLY
  if [[ -n $limit ]]; then gib "$limit"; found+=$REPLY; else found+=none; fi
  [[ -z $limit ]] || ((limit > available)) || available=$limit
  grade "$available" 8388608 1048576
  add "$REPLY" memory "$found" ">= 8 GiB" "$fix${limit:+, or a higher limit of the container}"
}

check_shm() {
  local fix="docker run --shm-size=1g, or: mount -o remount,size=1G /dev/shm"
  space /dev/shm || { add warn /dev/shm "not known" ">= 512 MB" "$fix"; return; }
  ((FREE >= SIZE / 2)) || fix="delete what killed runs left there; $fix"
  grade "$FREE" 500000 62500 # KiB: 512 and 64 MB
  add "$REPLY" /dev/shm "$((FREE * 1024 / 1000000)) MB free of $((SIZE * 1024 / 1000000))" ">= 512 MB" "$fix"
}

check_disk() {
  local found
  space . || { add warn disk "not known" ">= 10 GiB" "df -h ."; return; }
  gib "$FREE"; found="$REPLY free in $PWD"
  grade "$FREE" 10485760 1048576
  add "$REPLY" disk "$found" ">= 10 GiB" "delete old checkpoints, or --output_dir on another disk"
}

check_kernel() {
  local release=""
  read -r release < "$SYS/proc/sys/kernel/osrelease" || :
  REPLY=warn
  [[ ! $release =~ ^([0-9]+)\.([0-9]+) ]] || grade "$((BASH_REMATCH[1] * 1000 + BASH_REMATCH[2]))" 5005 0
  add "$REPLY" kernel "${release:-not known}" ">= 5.5" "older ones can make a process hang: update it"
}

check_host_name() {
  local verdict=ok found fix="several hosts fail (gloo connectFullMesh): set GLOO_SOCKET_IFNAME, or mend /etc/hosts"
  if resolve "$HOST_NAME"; then found="$HOST_NAME is $REPLY"; else found="$HOST_NAME does not resolve" REPLY=127.; fi
  [[ ($REPLY != 127.* && $REPLY != ::1) || -n ${GLOO_SOCKET_IFNAME:-} ]] || verdict=warn
  add "$verdict" "host name" "$found" "not 127.*" "$fix"
}

takes() { # VARIABLE INTERFACE: whether its value means this interface: NCCL's prefixes, =exact names, ^exclusions
  local value=${!1} name names list hit=false
  [[ $1 == NCCL* ]] || value="=$value" # gloo knows exact names only
  list=${value#^}
  IFS=, read -ra names <<< "${list#=}"
  for name in "${names[@]}"; do
    [[ $2 != "$name" && ($list == =* || $2 != "$name"*) ]] || hit=true
  done
  if [[ $value == ^* ]]; then [[ $hit == false ]]; else [[ $hit == true ]]; fi
}

check_interfaces() {
  local path names=() name variable verdict=warn
  for path in "$SYS"/sys/class/net/*/operstate; do
    name=${path%/operstate} name=${name##*/}
    [[ ! -r $path || $name == lo || $(< "$path") == down ]] || { names+=("$name"); verdict=ok; }
  done
  add "$verdict" interfaces "${names[*]:-lo only}" "one that is up" "one host only, until an interface is up"
  for variable in NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME; do
    [[ -n ${!variable:-} ]] || continue
    verdict=FAIL
    for name in lo ${names[@]+"${names[@]}"}; do ! takes "$variable" "$name" || verdict=ok; done
    add "$verdict" "$variable" "${!variable}" "of: lo ${names[*]:-}" "give this host's own interface"
  done
}

check_route() {
  local address=${MASTER_ADDR:-} row="route to master" text device="" variable
  [[ -n $address ]] || { add ok "$row" "MASTER_ADDR is not set" "set with several hosts"; return; }
  valid_host "$address" || { add FAIL "$row" "$address" "a host name or address" "mend MASTER_ADDR"; return; }
  resolve "$address" || { add FAIL "$row" "$address does not resolve" "an address" "mend /etc/hosts or DNS"; return; }
  MASTER=$REPLY
  command -v ip >/dev/null || { add warn "$row" "not known (no ip)" any "apt-get install iproute2"; return; }
  if ! text=$(limited 5 ip -o route get "$MASTER" 2>&1); then
    add FAIL "$row" "$MASTER: ${text##*: }" "a route" "mend MASTER_ADDR, or bring up the interface of its network"
    return
  fi
  if [[ $text == local* ]]; then MASTER_HERE=true; add ok "$row" "$MASTER is this host" any; return; fi
  [[ ! $text =~ \ dev\ ([^ ]+) ]] || device=${BASH_REMATCH[1]}
  for variable in NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME; do
    [[ -z ${!variable:-} ]] || takes "$variable" "$device" ||
      { add warn "$row" "$device, but $variable=${!variable}" "one interface" "set $variable=$device"; return; }
  done
  [[ ! $text =~ \ src\ ([^ ]+) ]] || text=${BASH_REMATCH[1]}
  add ok "$row" "$MASTER by $device from $text" any
}

check_public() {
  local network verdict=warn
  [[ -n $MASTER ]] || return 0
  for network in 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 127.0.0.0/8 169.254.0.0/16 100.64.0.0/10; do
    ! inside "$MASTER" "$network" || verdict=ok
  done
  [[ ! $MASTER =~ ^(::1|[fF][cCdD][0-9A-Fa-f]{2}:.*|[fF][eE][89abAB].*:.*)$ ]] || verdict=ok
  if [[ $verdict == ok ]]; then add ok "master is private" "$MASTER" "a private address"; return; fi
  add warn "master is private" "$MASTER is public" "a private address" \
    "the rendezvous port asks nobody for a password: bind to a private interface, or close it with a firewall"
}

check_proxies() {
  local name found="" entry entries=() master=${MASTER_ADDR:-} verdict=warn
  for name in {http,https,all}_proxy {HTTP,HTTPS,ALL}_PROXY; do
    [[ -z ${!name:-} ]] || found+="$name " # its value may hold a password
  done
  IFS=', ' read -ra entries <<< "${no_proxy:-${NO_PROXY:-}}"
  for entry in ${entries[@]+"${entries[@]}"}; do
    entry=${entry#.}
    [[ $entry == "*" || $entry == "$master" || $master == *".$entry" ]] || inside "$MASTER" "$entry" || continue
    verdict=ok
  done
  [[ -n $found && -n $master ]] || verdict=ok
  add "$verdict" proxies "${found:-none}" "MASTER_ADDR in NO_PROXY" "export NO_PROXY=\$NO_PROXY,$master, and no_proxy"
}

check_infiniband() {
  local state name found="" verdict=warn
  for state in "$SYS"/sys/class/infiniband/*/ports/*/state; do
    [[ -r $state ]] || continue
    name=${state%/ports/*}
    found+="${name##*/} $(< "$state") "
  done
  [[ -n $found && $found != *ACTIVE* && ${NCCL_IB_DISABLE:-0} != 1 ]] || verdict=ok
  found=${found:-none}${NCCL_IB_DISABLE:+ NCCL_IB_DISABLE=$NCCL_IB_DISABLE}
  add "$verdict" InfiniBand "$found" "none, or active" "bring its link up, or set NCCL_IB_DISABLE=1"
}

check_p2p() {
  local verdict=warn
  [[ $GPUS -gt 1 && $GPU_NAMES == *GeForce* ]] || return 0
  [[ ${NCCL_P2P_DISABLE:-0} != 1 ]] || verdict=ok
  add "$verdict" "P2P of GPUs" "GeForce, NCCL_P2P_DISABLE=${NCCL_P2P_DISABLE:-0}" NCCL_P2P_DISABLE=1 \
    "if the first step hangs: export NCCL_P2P_DISABLE=1"
}

check_port() {
  local port=${MASTER_PORT:-29500} verdict=FAIL
  valid_port "$port" || { add FAIL port "MASTER_PORT=$port" "1 to 65535" "mend MASTER_PORT"; return; }
  [[ -r $SYS/proc/net/tcp ]] || { add warn port "not known (no /proc/net/tcp)" free "ss -ltn"; return; }
  listening "$port" || { add ok port "$port is free" free; return; }
  if [[ -n $MASTER && $MASTER_HERE == false ]]; then verdict=warn; fi # only the master listens there
  add "$verdict" port "$port is in use" free "another run has it (ss -ltnp): another MASTER_PORT, on all hosts"
}

check_hub() {
  local url=${HF_ENDPOINT:-https://huggingface.co} site text status=0
  local fix="HF_ENDPOINT=https://MIRROR, a copied cache with HF_HUB_OFFLINE=1, --dataset FOLDER, or --dataset sample"
  [[ ${HF_HUB_OFFLINE:-0} == 0 ]] || { add ok Hub "HF_HUB_OFFLINE: the cache only" any; return; }
  [[ $url =~ ^(https?://)([^/@]*@)?([A-Za-z0-9._-]+(:[0-9]+)?)(/[^@\ ]*)?$ ]] ||
    { add warn Hub "HF_ENDPOINT is no http address" WikiText-2 "$fix"; return; }
  site=${BASH_REMATCH[3]} url=${BASH_REMATCH[1]}${BASH_REMATCH[3]}${BASH_REMATCH[5]%/} # without a password
  [[ -n $PY ]] || { add warn Hub "$site: not asked (no Python)" WikiText-2 "see Python"; return; }
  text=$(limited 8 "$PY" - "$url" 2>&1 << 'HUB'
import sys, urllib.request as u
url = sys.argv[1] + "/datasets/Salesforce/wikitext/resolve/main/wikitext-2-raw-v1/test-00000-of-00001.parquet"
try:
    u.urlopen(u.Request(url, headers={"Range": "bytes=0-0"}), timeout=4).close()
except (OSError, ValueError) as error:
    sys.exit("HTTP %s" % error.code if hasattr(error, "code") else str(getattr(error, "reason", error)))
HUB
  ) || status=$?
  [[ $status != 0 ]] || { add ok Hub "$site answers" WikiText-2; return; }
  text=${text##*$'\n'}
  add warn Hub "$site: ${text:-no answer}" WikiText-2 "$fix"
}

check_all() {
  local check
  for check in read_pins ask_nvidia_smi ask_nvcc ask_python check_gpus check_driver check_python check_torch_cuda; do
    "$check" || :
  done
  LINES_OUT=("===== Host: $HOST_NAME =====" "GPU Count: $GPUS" "CUDA Version: ${NVCC:-none (no nvcc)}"
    "PyTorch Version: ${FACT[torch]:-none}" "CUDA Available: ${FACT[available]:-False}")
  check_package torch FAIL training
  check_package deepspeed FAIL training
  check_package transformers warn "export and text"
  check_package datasets warn WikiText-2
  for check in nccl toolkit compiler ninja libaio ops memory shm disk kernel host_name interfaces route public proxies \
    infiniband p2p port hub; do
    "check_$check" || :
  done
}

# --- between hosts: a port, an all-reduce ---

check_peer() {
  local here="" command status=0 text row fields
  if resolve "$PEER_HOST"; then here=$(limited 5 ip -o route get "$REPLY" 2>/dev/null) || here=""; fi
  if [[ $here =~ \ src\ ([^ ]+) ]]; then here=${BASH_REMATCH[1]}; else here=THIS_HOST; fi
  [[ $here != *:* ]] || here="[$here]"
  command="check_env.sh --peer $here:$LISTEN"
  [[ $LISTEN == "$PEER_PORT" ]] || command+=" --listen $PEER_PORT"
  printf 'waiting %s s for %s; run there now: bash scripts/%s\n' "$TIMEOUT" "$PEER_HOST:$PEER_PORT" "$command" >&2
  if [[ -z $PY ]]; then knock_for_a_while "$command"; return; fi
  text=$(limited $((TIMEOUT + 15)) "$PY" - "$PEER_HOST" "$PEER_PORT" "$LISTEN" "$TIMEOUT" "$HOST_NAME" "$command" \
    2>&1 << 'PEER'
import binascii, os, socket, sys, threading, time
host, port, listen, limit, name, command = sys.argv[1:]
where, waited, end = "%s:%s" % (host, port), "for %s s" % limit, time.time() + int(limit)
token = binascii.hexlify(os.urandom(8)).decode()
greeting, incoming, answer, reason = ("check_env %s %s\n" % (token, name)).encode(), [], "", ""
causes = ["the command was not started there (%s)" % command, "a firewall there", "a wrong address or interface"]
def verdict(*fields):
    print("\x1f".join(fields))
def serve():
    while True:
        link, address = server.accept()
        try:
            link.settimeout(2)
            if link.recv(300).startswith(b"check_env "):
                link.sendall(greeting)
                incoming.append(address[0])
        except OSError:
            pass  # a scanner, or the other side gave up
        link.close()
try:
    family = sorted(socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM))[0][0]  # IPv4 first
except (OSError, UnicodeError) as error:
    verdict("FAIL", "outgoing", "%s: %s" % (host, error.args[-1]), "an address", "mend the name, or write the address")
    sys.exit()
server = socket.socket(family)
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
try:
    server.bind(("", int(listen)))
    server.listen(16)
except OSError as error:
    verdict("FAIL", "port", "%s: %s" % (listen, error.strerror), "free", "end what has it (ss -ltnp), or take another")
    sys.exit()
thread = threading.Thread(target=serve)
thread.daemon = True
thread.start()
while time.time() < end and not (answer and incoming):
    link = socket.socket(family)
    link.settimeout(3)
    try:
        if not answer:
            reason = "no answer (timed out)"
            link.connect((host, int(port)))
            reason = "connected, but what listens there is not check_env.sh"
            if link.getsockname() != link.getpeername():  # TCP can meet itself on an ephemeral port
                link.sendall(greeting)
                words = link.recv(300).decode("ascii", "replace").split()
                if words[1:2] == [token]:
                    verdict("FAIL", "outgoing", "%s is this host" % host, "the other host", "give the other's address")
                    sys.exit()
                answer = words[-1] if words[:1] == ["check_env"] else ""
    except ConnectionRefusedError:
        reason = "refused"
    except socket.timeout:
        pass
    except OSError as error:
        reason = error.strerror or str(error)
    link.close()
    time.sleep(0.2)
if answer:
    verdict("ok", "outgoing", "%s, %s answers" % (where, answer), "a connection", "")
else:
    if reason != "refused":
        causes = causes[1:] + causes[:1]
    verdict("FAIL", "outgoing", "%s: %s %s" % (where, reason, waited), "a connection", "causes: " + "; ".join(causes))
if incoming:
    verdict("ok", "incoming", "port %s, from %s" % (listen, incoming[0]), "a connection", "")
else:
    verdict("FAIL", "incoming", "port %s: nobody came %s" % (listen, waited), "a connection",
            "causes: the command was not started there (%s); a firewall here; a wrong address or interface" % command)
PEER
  ) || status=$?
  while IFS= read -r row; do
    IFS=$US read -ra fields <<< "$row"
    [[ ${#fields[@]} -lt 4 ]] || add "${fields[@]}"
  done <<< "$text"
  [[ ${#ROWS[@]} != 0 ]] || add FAIL peer "exit $status: ${text##*$'\n'}" "an answer" "set PYTHON to one that works"
}

knock_for_a_while() { # COMMAND_THERE: the test of a port without Python
  local end=$((SECONDS + TIMEOUT)) where="$PEER_HOST:$PEER_PORT" reason="" met=false
  while ! $met && ((SECONDS < end)); do
    if knock "$PEER_HOST" "$PEER_PORT"; then
      [[ $REPLY != "check_env "* ]] || met=true
      reason="connected, but what listens there is not check_env.sh"
    else
      reason=$REPLY
    fi
    $met || read -rt 0.3 _ <> <(:) || : # a sleep that needs no program
  done
  if $met; then add ok outgoing "$where, ${REPLY##* } answers" "a connection"
  else add FAIL outgoing "$where: $reason for $TIMEOUT s" "a connection" \
    "causes: the command was not started there ($1); a firewall there; a wrong address or interface"; fi
  add warn incoming "not checkable without Python" "a connection" "set PYTHON"
}

# The words for torchrun, in LAUNCH, as the environment says.
plan_ranks() {
  local name ranks=${GPUS_PER_HOST:-} hosts=${NNODES:-} node=${NODE_RANK:-}
  for name in WORLD_SIZE NNODES GPUS_PER_HOST; do
    [[ ${!name:-1} =~ ^[1-9][0-9]{0,5}$ ]] || die "$name=${!name} is not a number" 2
  done
  [[ ${RANK:-0}${NODE_RANK:-0} =~ ^[0-9]{1,12}$ ]] || die "RANK=${RANK:-} NODE_RANK=$node: not numbers" 2
  if [[ -n $hosts${WORLD_SIZE:-} ]]; then
    ranks=${ranks:-1}
    [[ -n $hosts ]] || ((WORLD_SIZE % ranks == 0)) || die "WORLD_SIZE=$WORLD_SIZE is no multiple of $ranks per host" 2
    hosts=${hosts:-$((WORLD_SIZE / ranks))} node=${node:-$((10#${RANK:-0} / ranks))}
    valid_host "${MASTER_ADDR:-}" || die "--allreduce over $hosts hosts needs MASTER_ADDR, the first host's address" 2
    LAUNCH=(--nnodes "$hosts" --node_rank "$node" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
  else
    [[ -z ${RANK:-}$node${MASTER_ADDR:-} ]] || die "--allreduce needs NNODES, NODE_RANK, MASTER_ADDR, or none of them" 2
    name='import torch; print(torch.cuda.device_count() or 2)'
    [[ -n $ranks || -z $PY ]] || ranks=$(limited 60 "$PY" -c "$name" 2>/dev/null) || ranks=2
    LAUNCH=(--standalone --local_addr 127.0.0.1)
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
  fi
  LAUNCH+=(--nproc_per_node "$ranks")
}

check_allreduce() {
  local code text line status=0 where="--peer tests the port, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME the interface"
  plan_ranks
  [[ -n $PY ]] || { add FAIL all-reduce "not measured (no Python)" "GB/s" "set PYTHON"; return; }
  read -r -d '' code << 'REDUCE' || :
import datetime, os, time
import torch
import torch.distributed as dist
gpu, local, reps = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"]), 5
if gpu:
    torch.cuda.set_device(local)
device, backend, size = ("cuda", "nccl", 2**28) if gpu else ("cpu", "gloo", 2**24)
dist.init_process_group(backend, timeout=datetime.timedelta(seconds=int(os.environ["LIMIT"])))
n, tensor, seconds = dist.get_world_size(), torch.ones(size // 4, device=device), torch.zeros(1, device=device)
dist.all_reduce(tensor)
if not bool((tensor == n).all()):
    raise SystemExit("Error: the sum over the ranks is wrong")
dist.all_reduce(seconds)
seconds.item()  # all ranks are here
start = time.perf_counter()
for _ in range(reps):
    dist.all_reduce(tensor)
if gpu:
    torch.cuda.synchronize()
seconds += (time.perf_counter() - start) / reps
dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
took = seconds.item()
if local == 0:
    print("measured %.3f GB/s, %d ranks, %s, %d MiB in %.4f s" % (
        2 * (n - 1) / n * size / took / 1e9, n, backend, size / 2**20, took), flush=True)
dist.destroy_process_group()
REDUCE
  text=$(LIMIT=$TIMEOUT limited "$TIMEOUT" "$PY" -m torch.distributed.run "${LAUNCH[@]}" --no_python "$PY" -c "$code" \
    2>&1 < /dev/null) || status=$?
  if [[ $status == 0 && $text =~ measured\ ([0-9.]+\ GB/s,\ ([0-9]+)[^$'\n']*) ]]; then
    line=${BASH_REMATCH[1]}
    if [[ ${BASH_REMATCH[2]} != 1 ]]; then add ok all-reduce "$line" "bus bandwidth, 2(n-1)/n x bytes / seconds"
    else add warn all-reduce "1 rank: nothing is sent" "2 ranks" "set NNODES, or GPUS_PER_HOST=2"; fi
  elif [[ $status == 124 || $status == 137 ]]; then
    add FAIL all-reduce "not done in $TIMEOUT s" "GB/s" "start it on every host; $where; NCCL_DEBUG=INFO says more"
  else
    [[ ! $text =~ [^$'\n']*(Error|error):[^$'\n']* ]] || text=${BASH_REMATCH[0]##*\]: }
    add FAIL all-reduce "exit $status: ${text##*$'\n'}" "GB/s" "$where"
  fi
}

# --- output ---

quote() { REPLY=${1//\\/"\\\\"} REPLY="\"${REPLY//\"/"\\\""}\""; }
unquote() { clean "$1"; REPLY=${REPLY//\\\"/\"} REPLY=${REPLY//\\\\/\\}; }

print_rows() { # a table, or with --json the inside of a list
  local row fields i widths=(4 0 0 0) colour comma="" line keys=(verdict name found wanted fix)
  for row in "$@"; do
    IFS=$US read -ra fields <<< "$row"
    for i in 1 2 3; do ((${#fields[i]} <= widths[i])) || widths[i]=${#fields[i]}; done
  done
  for row in "$@"; do
    IFS=$US read -ra fields <<< "$row"
    line=""
    if $JSON; then
      for i in "${!keys[@]}"; do quote "${fields[i]:-}"; line+=", \"${keys[i]}\": $REPLY"; done
      printf '%s\n  {%s}' "$comma" "${line#, }"
      comma=,
      continue
    fi
    for i in 1 2 3; do printf -v line '%s  %-*s' "$line" "${widths[i]}" "${fields[i]}"; done
    line+="  ${fields[4]:-}"
    printf -v row '%-4s' "${fields[0]}"
    case ${fields[0]} in ok) colour=32 ;; warn) colour=33 ;; *) colour=31 ;; esac
    ! $COLOUR || row=$'\e['${colour}m$row$'\e[0m'
    printf '%s%s\n' "$row" "${line%"${line##*[! ]}"}"
  done
}

print_head() { # HOST LINE...
  local host=$1 line comma=""
  shift
  if $JSON; then clean "$host"; quote "$REPLY"; printf '{"host": %s,\n "lines": [' "$REPLY"; fi
  for line in "$@"; do
    clean "$line"
    $JSON || { printf '%s\n' "$REPLY"; continue; }
    quote "$REPLY"
    printf '%s\n  %s' "$comma" "$REPLY"
    comma=,
  done
  ! $JSON || printf '\n ],\n "checks": ['
}

# --- other hosts over ssh ---

ask_host() { # HOST: THEIR_LINES and THEIR_ROWS out of the JSON of this script there; fails with the reason in REPLY
  local text line status=0 options=() name pins="" words=() field='"(([^"\\]|\\.)*)"' i row
  local check="^  \{\"verdict\": \"(ok|warn|FAIL)\", \"name\": $field, \"found\": $field, \"wanted\": $field, "
  check+="\"fix\": $field\}"
  read -ra options <<< "${SSH_OPTIONS:-}" || :
  for name in "${!PIN[@]}"; do pins+="$name==${PIN[$name]},"; done
  words=("CHECK_ENV_PINS=$pins" "CHECK_ENV_PYTHON=$PY" "MASTER_ADDR=${MASTER_ADDR:-}" "MASTER_PORT=${MASTER_PORT:-}")
  for i in "${!words[@]}"; do # they go through a shell there
    [[ ${words[i]} =~ ^[A-Za-z0-9_.:=/,+-]*$ ]] || unset "words[$i]"
  done
  THEIR_LINES=() THEIR_ROWS=()
  text=$(limited "$TIMEOUT" ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 \
    ${options[@]+"${options[@]}"} -- "$1" env "${words[@]}" bash -s -- --json < "$SELF" 2>&1) || status=$?
  while IFS= read -r line; do
    if [[ $line =~ $check ]]; then
      row=${BASH_REMATCH[1]}
      for name in "${BASH_REMATCH[2]}" "${BASH_REMATCH[4]}" "${BASH_REMATCH[6]}" "${BASH_REMATCH[8]}"; do
        unquote "$name"
        row+=$US$REPLY
      done
      THEIR_ROWS+=("$row")
    elif [[ $line =~ ^\ \ $field,?$ ]]; then
      unquote "${BASH_REMATCH[1]}"
      THEIR_LINES+=("$REPLY")
    fi
  done <<< "$text"
  if [[ ${#THEIR_ROWS[@]} != 0 && $status -le 1 ]]; then
    [[ $status == 0 ]] || FAILED=true
    return
  fi
  REPLY="exit $status: ${text##*$'\n'}"
  [[ $status != 124 ]] || REPLY="no answer in $TIMEOUT s"
  return 1
}

found_in() { # NAME ROW...: what was found
  local name=$1 row fields
  shift
  REPLY=none
  for row in "$@"; do
    IFS=$US read -ra fields <<< "$row"
    [[ ${fields[1]} != "$name" ]] || REPLY=${fields[2]}
  done
}

compare_host() { # HOST: a row for each thing that is to be equal there and here; the devices may differ
  local thing mine theirs
  for thing in GPUs "GPU driver" Python torch deepspeed transformers datasets NCCL "torch's CUDA"; do
    found_in "$thing" "${MY_ROWS[@]}"; mine=$REPLY
    found_in "$thing" "${THEIR_ROWS[@]}"; theirs=$REPLY
    if [[ $thing == GPU* ]]; then
      [[ $mine$theirs == nonenone ]] || add ok "$1: $thing" "there $theirs, here $mine" "may differ"
      continue
    fi
    mine=${mine%%[: ]*} theirs=${theirs%%[: ]*}
    [[ $mine != not && $theirs != not ]] || continue # "not known", for want of something that has its own row
    if [[ $mine == "$theirs" ]]; then add ok "$1: $thing" "$mine on both" equal
    else add FAIL "$1: $thing" "there $theirs, here $mine" equal "install the same on both"; fi
  done
}

check_hosts() {
  local host comma="" fix
  MY_ROWS=("${ROWS[@]}") ROWS=()
  ! $JSON || printf ', "hosts": ['
  for host in "${HOSTS[@]}"; do
    if ask_host "$host"; then
      if $JSON; then printf '%s' "$comma"; else echo; fi
      print_head "$host" ${THEIR_LINES[@]+"${THEIR_LINES[@]}"}
      print_rows "${THEIR_ROWS[@]}"
      ! $JSON || printf '\n ]}'
      comma=,
      compare_host "$host"
      continue
    fi
    case $REPLY in
      *"resolve hostname"*) fix="mend the name: ~/.ssh/config, /etc/hosts or DNS" ;;
      *refused*) fix="start sshd there, or give its port: SSH_OPTIONS=\"-p PORT\"" ;;
      *"Host key"*) fix="log in once by hand and compare the key" ;;
      *denied*) fix="ssh-copy-id $host, or SSH_OPTIONS=\"-i KEY\"" ;;
      *"timed out"* | "no answer"* | *unreachable*) fix="host down, a firewall that drops it, or a wrong address" ;;
      *) fix="try: ssh $host bash -s < scripts/check_env.sh" ;;
    esac
    add FAIL "$host: ssh" "$REPLY" "a shell" "$fix"
  done
  if $JSON; then printf '\n], "comparison": ['; else printf '\n===== These hosts and %s =====\n' "$HOST_NAME"; fi
  print_rows "${ROWS[@]}"
  ! $JSON || printf '\n]'
}

usage() {
  local line
  [[ -r $SELF ]] || die "the first lines of the script say how to use it"
  while read -r line && [[ $line == "#"* ]]; do
    [[ $line == "#!"* ]] || printf '%s\n' "${line#\# }"
  done < "$SELF"
}

main() {
  local mode="" limit=120
  while (($#)); do
    case $1 in
      --host | --peer | --allreduce)
        [[ -z $mode ]] || die "$mode and $1: one at a time" 2
        mode=$1
        ;;& # go on to its own words
      --host)
        while (($# > 1)) && [[ $2 != --* ]]; do
          valid_login "$2" || die "--host $2: write USER@HOST or HOST" 2
          HOSTS+=("$2")
          shift
        done
        [[ ${#HOSTS[@]} != 0 ]] || die "--host needs one USER@HOST or more" 2
        [[ -r $SELF ]] || die "--host sends this script and needs it as a file: bash check_env.sh --host ..." 2
        ;;
      --peer)
        [[ ! ${2:-} =~ ^\[?([^]]+)\]?:([0-9]+)$ ]] || PEER_HOST=${BASH_REMATCH[1]} PEER_PORT=${BASH_REMATCH[2]}
        { valid_host "$PEER_HOST" && valid_port "$PEER_PORT"; } || die "--peer ${2:-}: write HOST:PORT" 2
        limit=60
        shift
        ;;
      --allreduce) ;;
      --json) JSON=true ;;
      --listen) valid_port "${2:-}" || die "--listen ${2:-}: write a port" 2; LISTEN=$2; shift ;;
      --timeout)
        [[ ${2:-} =~ ^[1-9][0-9]{0,5}$ ]] || die "--timeout ${2:-}: write seconds" 2
        TIMEOUT=$2
        shift
        ;;
      -h | --help) usage; exit 0 ;;
      *) die "unknown word $1: write --json, --host, --peer, --listen, --allreduce, --timeout or --help" 2 ;;
    esac
    shift
  done
  [[ -z $LISTEN || $mode == --peer ]] || die "--listen goes with --peer" 2
  LISTEN=${LISTEN:-$PEER_PORT} TIMEOUT=${TIMEOUT:-$limit}
  [[ ! -t 1 || -n ${NO_COLOR:-} ]] || COLOUR=true
  read -r HOST_NAME < "$SYS/proc/sys/kernel/hostname" || : # HOSTNAME may have come from another host
  find_python
  LINES_OUT=("===== Host: $HOST_NAME =====")
  case $mode in
    --peer | --allreduce) "check_${mode#--}" ;;
    *) check_all ;;
  esac
  print_head "$HOST_NAME" "${LINES_OUT[@]}"
  print_rows "${ROWS[@]}"
  ! $JSON || printf '\n ]'
  [[ $mode != --host ]] || check_hosts
  ! $JSON || echo '}'
  ! $FAILED || exit 1
}

main "$@"
