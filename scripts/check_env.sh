#!/usr/bin/env bash
# Is this host fit to train, and do several fit together? Prints the tutorial's five lines, then one verdict a line:
# ok|warn|FAIL  name  found  wanted  fix. Exit 0: fine, warnings allowed; 1: a FAIL; 2: wrong usage.
# Usage: scripts/check_env.sh [--json]                        this host; also ssh HOST bash -s < scripts/check_env.sh
#        scripts/check_env.sh [--json] --host USER@HOST...    and these over ssh, compared with this one
#        scripts/check_env.sh [--json] --peer HOST:PORT [--listen PORT] [--timeout 60]   a port both ways: on both hosts
# environment: PYTHON   MASTER_ADDR   MASTER_PORT=29500   SSH_OPTIONS="-p 2222 -i KEY"   PROJECT=this folder, over ssh
set -euo pipefail
die() { printf 'check_env.sh: %s\n' "$1" >&2; exit "${2:-1}"; }

export LC_ALL=C
SELF=${BASH_SOURCE[0]:-} US=$'\x1f' PY="" ROWS=() GPUS=0 DRIVER="" NVCC="none (no nvcc)"

# Rows are "host NAME", "line TEXT" and "row VERDICT NAME FOUND WANTED FIX", with US between the fields.
row() { ROWS+=("row$(printf "$US%s" "${@//[^ -~]/ }")"); }

command -v timeout >/dev/null || timeout() { shift; "$@"; } # SECONDS COMMAND...

check_gpus() {
  local text="" status=0 line names=""
  if command -v nvidia-smi >/dev/null; then text=$(timeout 20 nvidia-smi -L 2>&1) || status=$?; fi
  while read -r line; do
    if [[ $line =~ ^GPU\ [0-9]+:\ (.*)\ \(UUID ]]; then GPUS=$((GPUS + 1)) names+="${BASH_REMATCH[1]}, "; fi
  done <<< "$text"
  if [[ $GPUS != 0 ]]; then
    row ok GPUs "${names%, }" any ""
    DRIVER=$(timeout 20 nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || DRIVER=""
    DRIVER=${DRIVER%%$'\n'*}
  elif [[ $status != 0 && $status != 6 ]]; then # 6: no device
    row FAIL GPUs "nvidia-smi fails: exit $status ${text##*$'\n'}" "an answer in 20 s" "reboot after an update of the driver"
  else
    row warn GPUs none "an NVIDIA GPU" "training works on CPU ranks, slowly; with a GPU, install its driver"
  fi
}

ask_python() { # one call for all that Python finds out more simply than bash; prints rows
  timeout 90 "${PY:-python3}" - "$GPUS" "$DRIVER" 2>/dev/null << 'PROBE'
import fcntl, glob, ipaddress, os, platform, re, shutil, socket, struct, sys, urllib.request
from importlib import metadata
gpus, driver, env = int(sys.argv[1]), sys.argv[2], os.environ.get
def row(verdict, name, found, wanted, fix=""):
    words = ("row", verdict, name, found, wanted, "" if verdict == "ok" else fix)
    print("\x1f".join(re.sub("[^ -~]", " ", str(word)) for word in words), flush=True)
def judge(good, name, found, wanted, fix, bad="warn"):
    row("ok" if good else bad, name, found, wanted, fix)
def major(version):
    return int(re.match(r"\d*", version).group() or 0)
judge(sys.version_info >= (3, 11), "Python", platform.python_version() + " (" + sys.executable + ")", ">= 3.11",
      "install Python 3.11 or newer, or set PYTHON", "FAIL")
for name in "torch", "deepspeed", "transformers", "datasets", "ninja":
    try:
        row("ok", name, metadata.version(name), "any")
    except metadata.PackageNotFoundError:
        row("warn" if name == "ninja" else "FAIL", name, "none", "any", "scripts/setup.sh, or pip install " + name)
version, cuda, seen = "none", "none", False
try:
    import torch
    version, cuda, seen = torch.__version__, torch.version.cuda or "none", torch.cuda.is_available()
except (ImportError, OSError, AttributeError) as error:
    row("FAIL", "import torch", repr(error), "no error", "install torch again: scripts/setup.sh")
print("line\x1fPyTorch Version: %s\nline\x1fCUDA Available: %s" % (version, seen))
if gpus:
    wheel = "cu130" if major(driver) >= 580 else "cu128" if major(driver) >= 525 else "cpu"
    wheel = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/" + wheel
    wheel = sys.executable + " -m " + wheel  # .venv's pip, whether or not .venv is active
    least = {"11": 450, "12": 525}.get(cuda.split(".")[0], 580)  # NVIDIA: minor version compatibility
    judge(major(driver) >= least, "GPU driver", driver or "not known",
          ">= %d for CUDA %s" % (least, "13, as PyPI's torch" if cuda == "none" else cuda),
          "update the driver, or take the wheel that fits it: " + wheel, "FAIL" if driver else "warn")
    hidden = env("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    judge(seen, "torch's CUDA", cuda, "torch.cuda.is_available()", "unset CUDA_VISIBLE_DEVICES" if hidden else
          "the driver is too old, no /dev/nvidia* in here, or a torch for CPUs: " + wheel, "warn" if hidden else "FAIL")
judge(shutil.which("c++"), "g++", shutil.which("c++") or "none", "any",
      "DeepSpeed's ops do not compile, PyTorch's are taken: apt-get install g++ python3-dev")
cache = os.path.join(env("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "torch_extensions", "py%d%d_*")
ops = env("TORCH_EXTENSIONS_DIR") or cache % sys.version_info[:2]
built, locks = sorted(path.split("/")[-1][:-3] for path in glob.glob(ops + "/*/*.so")), glob.glob(ops + "/*/lock")
judge("cpu_adam" in built and not locks, "compiled ops", " ".join(locks or built) or "none", "cpu_adam, no lock",
      "scripts/setup.sh, or a minute in the first run; delete a lock if nothing compiles now")
free = int(re.search(r"MemAvailable: +(\d+)", open("/proc/meminfo").read()).group(1)) * 1024
for path in glob.glob("/sys/fs/cgroup/memory.max") + glob.glob("/sys/fs/cgroup/memory/memory.limit_in_bytes"):
    free = min([free] + [int(word) for word in open(path).read().split() if word.isdigit()])  # of a container
for name, found, warn, fail, fix in (
    ("memory", free, 8192, 1024, "fewer ranks, a smaller model, no offload, or a higher limit of the container"),
    ("/dev/shm", shutil.disk_usage("/dev/shm").free, 512, 64, "docker run --shm-size=1g"),
    ("disk", shutil.disk_usage(".").free, 10240, 1024, "delete old checkpoints, or --output_dir on another disk"),
):
    row("ok" if found >= warn << 20 else "warn" if found >= fail << 20 else "FAIL", name, "%d MiB free" % (found >> 20),
        ">= %d MiB" % warn, fix)
try:
    own = socket.gethostbyname(socket.gethostname())
except OSError:
    own = "127.? (it does not resolve)"
judge(env("GLOO_SOCKET_IFNAME") or not own.startswith("127."), "host name", own, "not 127.*",
      "several hosts fail (gloo connectFullMesh): export GLOO_SOCKET_IFNAME, or mend /etc/hosts")
ways, probe = {}, socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _, name in socket.if_nameindex():
    try:
        ways[socket.inet_ntoa(fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))[20:24])] = name
    except OSError:
        pass  # it has no IPv4 address
chosen = {name: env(name).lstrip("=") for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if env(name)}
for name, value in chosen.items():
    judge(value[0] == "^" or any(one.startswith(tuple(value.split(","))) for one in ways.values()), name, value,
          "of: " + " ".join(ways.values()), "give this host's own interface", "FAIL")
master, port, here = env("MASTER_ADDR", ""), env("MASTER_PORT", "29500"), True
if master:
    try:
        address = socket.getaddrinfo(master, None, socket.AF_INET)[0][4][0]
        probe.connect((address, 9))  # sends nothing
        way, here = ways.get(probe.getsockname()[0], "?"), address in ways
        fits = [value[0] == "^" or way.startswith(tuple(value.split(","))) for value in chosen.values()]
        wrong = [name for name, good in zip(chosen, fits) if not (here or good)]
        judge(not wrong, "route to master", "this host" if here else way + " " + probe.getsockname()[0],
              "the interface chosen", "export %s=%s" % ("".join(wrong[:1]), way))
        judge(not ipaddress.ip_address(address).is_global, "master is private", address, "a private address",
              "who reaches the port can join the run: take a private address, or close the port with a firewall")
    except (OSError, UnicodeError) as error:
        row("warn" if ":" in master else "FAIL", "route to master", "%s: %s" % (master, error), "an IPv4 address",
            "mend MASTER_ADDR; IPv6 is not checked here")
try:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", int(port)))
    row("ok", "port", port + " is free", "free")
except (OSError, ValueError, OverflowError) as error:
    row("FAIL" if here else "warn", "port", "%s: %s" % (port, error), "free", "another run has it: another MASTER_PORT")
url, offline = env("HF_ENDPOINT", "https://huggingface.co"), env("HF_HUB_OFFLINE", "0") not in ("", "0")
try:
    if not offline:
        urllib.request.urlopen(url + "/datasets/Salesforce/wikitext/resolve/main/README.md", timeout=5).close()
    row("ok", "Hub", "HF_HUB_OFFLINE: the cache only" if offline else "answers", "WikiText-2")
except (OSError, ValueError) as error:
    row("warn", "Hub", error, "WikiText-2", "HF_ENDPOINT=https://MIRROR, a copied cache with HF_HUB_OFFLINE=1, \
--dataset FOLDER, or --dataset sample")
PROBE
}

check_host() {
  local text status=0 lines=()
  check_gpus
  text=$({ timeout 20 "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" --version || timeout 20 nvcc --version; } 2>&1) || :
  [[ ! $text =~ [^$'\n']*release[^$'\n']* ]] || NVCC=${BASH_REMATCH[0]}
  ROWS=("line$US===== Host: $(uname -n) =====" "line${US}GPU Count: $GPUS" "line${US}CUDA Version: $NVCC" "${ROWS[@]}")
  text=$(ask_python) || status=$?
  mapfile -t lines <<< "$text"
  [[ -z $text ]] || ROWS+=("${lines[@]}")
  [[ $text == *"line$US"* ]] || ROWS+=("line${US}PyTorch Version: none" "line${US}CUDA Available: False")
  [[ $status == 0 ]] || row FAIL Python "${PY:-none}: exit $status" "3.11, torch" "install it, or set PYTHON"
}

check_peer() { # HOST PORT LISTEN SECONDS: listens, and comes to the other host's port until both have met
  [[ -n $PY ]] || { row FAIL peer "no Python, to listen" Python "set PYTHON"; return; }
  mapfile -t ROWS < <("$PY" - "$@" << 'PEER'
import socket, sys, threading, time
host, port, listen, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
met, reason, end = {}, "no answer", time.time() + seconds
def serve():
    while True:
        met["incoming"] = server.accept()[1][0]
try:
    server = socket.create_server(("", listen))
except OSError as error:
    sys.exit(print("\x1f".join(("row", "FAIL", "port", "%d: %s" % (listen, error), "free", "take another port"))))
threading.Thread(target=serve, daemon=True).start()
print("waiting %d s: run check_env.sh --peer THIS_HOST:%d there now" % (seconds, listen), file=sys.stderr)
while time.time() < end and len(met) < 2:
    try:
        with socket.create_connection((host, port), timeout=3) as link:
            if listen == port and link.getsockname()[0] == link.getpeername()[0]:
                raise OSError("that is this host itself")
        met["outgoing"] = "%s:%d" % (host, port)
    except (OSError, UnicodeError) as error:
        reason = "%s:%d: %s" % (host, port, error)
    time.sleep(0.3)
for name, found in ("outgoing", reason), ("incoming", "nobody came to %d" % listen):
    fix = "" if name in met else "causes: the command was not started there; a firewall; a wrong address or interface"
    print("\x1f".join(("row", "FAIL" if fix else "ok", name, met.get(name, found), "a connection", fix)))
PEER
  )
  [[ ${#ROWS[@]} != 0 ]] || row FAIL peer "the check ended: its error is above" "both ways" "set PYTHON to 3.11 or newer"
}

check_other() { # USER@HOST: its rows, by this script over ssh
  local options=() words=("PROJECT=$(printf %q "$(cd "$root" && pwd)")") text status=0 rows=()
  read -ra options <<< "${SSH_OPTIONS:-}" || :
  for text in MASTER_ADDR MASTER_PORT; do [[ ! ${!text:-} =~ ^[A-Za-z0-9_.:-]+$ ]] || words+=("$text=${!text}"); done
  text=$(timeout 150 ssh -o BatchMode=yes -o ConnectTimeout=10 ${options[@]+"${options[@]}"} -- "$1" \
    env "${words[@]}" bash -s -- --rows < "$SELF" 2>&1) || status=$?
  mapfile -t rows < <(grep -aE "^(row|line)$US" <<< "$text")
  ROWS+=("host$US$1" ${rows[@]+"${rows[@]}"})
  [[ ${#rows[@]} != 0 && $status -le 1 ]] || row FAIL ssh "exit $status: ${text##*$'\n'}" "a shell, no password" \
    "ssh-copy-id $1; SSH_OPTIONS=\"-p PORT -i KEY\"; a firewall; try: ssh $1 bash -s < scripts/check_env.sh"
}

show() { # text|json: of several hosts also how they differ from the first; fails if a verdict is FAIL
  printf '%s\n' "${ROWS[@]}" | "$PY" -c 'import json, re, sys
hosts, keys = [], ("verdict", "name", "found", "wanted", "fix")
for text in sys.stdin.read().splitlines():
    kind, *words = [re.sub("[^ -~]", "?", word) for word in text.split("\x1f")]
    if kind == "host":
        hosts.append({"host": words[0], "lines": [], "checks": []})
    hosts[-1]["lines"] += words if kind == "line" else []
    hosts[-1]["checks"] += [dict(zip(keys, words))] if kind == "row" else []
for name in "Python", "torch", "deepspeed", "transformers", "datasets":
    found = ["".join(row["found"] for row in host["checks"] if row["name"] == name).split(" ")[0] for host in hosts]
    for host, there in zip(hosts, found):
        words = "FAIL", "same " + name, "%s, here %s" % (there, found[0]), "equal", "install that"
        host["checks"] += [dict(zip(keys, words))] if there and found[0] and there != found[0] else []
for host in hosts if sys.argv[1] == "text" else []:
    wide = [max([len(row[key]) for row in host["checks"]] or [0]) for key in keys[:4]]
    print("\n".join(host["lines"] or ["===== Host: %s =====" % host["host"]]))
    for row in host["checks"]:
        print("  ".join([row[key].ljust(width) for key, width in zip(keys, wide)] + [row["fix"]]).rstrip())
if sys.argv[1] == "json":
    print(json.dumps(dict(hosts[0], hosts=hosts[1:]), indent=1))
sys.exit(any(row["verdict"] == "FAIL" for host in hosts for row in host["checks"]))' "$1"
}

main() {
  local form=text peer=() hosts=() listen="" seconds=60 name root=${PROJECT:-.}
  while (($#)); do
    case $1 in
      --json | --rows) form=${1#--} ;;
      --host) while [[ ${2:-} =~ ^[A-Za-z0-9_][A-Za-z0-9_.@:-]*$ ]]; do hosts+=("$2"); shift; done
        [[ ${#hosts[@]} != 0 && -r $SELF ]] || die "--host needs USER@HOST, and this script as a file" 2 ;;
      --peer) [[ ${2:-} =~ ^([A-Za-z0-9][A-Za-z0-9.-]*):([0-9]{1,5})$ ]] || die "--peer ${2:-}: write HOST:PORT" 2
        peer=("${BASH_REMATCH[@]:1}") listen=${listen:-${peer[1]}}; shift ;;
      --listen) [[ ${2:-} =~ ^[0-9]{1,5}$ ]] || die "--listen ${2:-}: write a port" 2; listen=$2; shift ;;
      --timeout) [[ ${2:-} =~ ^[0-9]{1,5}$ ]] || die "--timeout ${2:-}: write seconds" 2; seconds=$2; shift ;;
      *) die "unknown word $1: write --json, --host, --peer, --listen or --timeout" 2 ;;
    esac
    shift
  done
  [[ ${#peer[@]} == 0 || ${#hosts[@]} == 0 ]] || die "--peer and --host: one at a time" 2
  for name in "${listen:-1}" "${peer[1]:-1}"; do ((10#$name > 0 && 10#$name < 65536)) || die "$name is no port" 2; done
  [[ ! -f $SELF ]] || root=${SELF%"${SELF##*/}"}./.. # above its folder
  for PY in "${PYTHON:-$root/.venv/bin/python}" "${PYTHON:-python3}" "${PYTHON:-python}" ""; do
    if [[ -z $PY ]] || command -v -- "$PY" >/dev/null; then break; fi
  done
  if [[ ${#peer[@]} != 0 ]]; then check_peer "${peer[@]}" "$listen" "$seconds"; else check_host; fi
  ROWS=("host$US$(uname -n)" "${ROWS[@]}")
  for name in ${hosts[@]+"${hosts[@]}"}; do check_other "$name"; done
  if [[ $form == rows ]]; then printf '%s\n' "${ROWS[@]}"; return; fi
  if "${PY:-false}" -c pass 2>/dev/null; then show "$form"; return; fi
  printf '%s\n' "${ROWS[@]#*"$US"}" | tr "$US" ' ' # no Python: plain rows
  return 1
}

main "$@"
