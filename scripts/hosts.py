"""What run_multihost.sh asks about the hosts of a run: is the hostfile sound, are all hosts there, fit and agreed.

Roll call: NODE_RANK 0 listens at PORT, the others come to it and say who they are, and all get the same answer. Without
one, torchrun waits 10 minutes for a missing host, and for ever where two hosts have the same NODE_RANK.

Run: python scripts/hosts.py hostfile FILE
     python scripts/hosts.py survey MASTER_ADDR
     python scripts/hosts.py ask MASTER_ADDR PORT FOLDER SCRIPT VENV_SCRIPT PYTHON HOST...
     python scripts/hosts.py deepspeed_env
     python scripts/hosts.py roll_call ADDRESS PORT NODE_RANK HOSTS PLAN RANKS_HERE SECONDS COMMAND...
hostfile prints HOST SLOTS lines, survey the way from this host to the first, ask what all hosts said of it over ssh,
deepspeed_env a .deepspeed_env that DeepSpeed's parser can read. After roll_call COMMAND takes this process's place.
HOSTS 0 is no roll call: it sees that the port is free (NODE_RANK 0) or waits until something listens there. What is
wrong ends each of them with one message and exit code 1.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

CAUSES = """usual causes, in this order: NODE_RANK {} is not started; a firewall; a wrong MASTER_ADDR or interface; \
unequal NNODES or MASTER_PORT; two hosts with one NODE_RANK"""
GRACE_S = 1.0  # after the last host, for one that comes twice
ENTRY = re.compile(r"(\S+)\s+slots=([1-9]\d{0,3})(\s+#.*)?", re.ASCII)
LOOPBACK = re.compile(r"127\.|::1$")
INFINIBAND = Path("/sys/class/infiniband")
HOST = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9._-]*")


def stop(message: str) -> None:
    sys.exit(f"run_multihost.sh: {ascii(message)[1:-1]}")


def read_hostfile(path: str) -> dict[str, int]:
    """Slots by host. Stricter than DeepSpeed's parser, which takes slots=0 and ignores what follows slots=N.

    Blank lines, lines that begin with # and a # comment after slots=N are fine for both.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except FileNotFoundError:
        stop(f"no hostfile {path}: copy configs/hostfile.example there and write your hosts into it")
    except (OSError, ValueError) as error:
        stop(f"cannot read the hostfile {path}: {error}")
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        if not (entry := ENTRY.fullmatch(line)):
            stop(f"{path} line {number}: {line} is not HOST slots=N, N at least 1, with nothing else but a # comment")
        if not HOST.fullmatch(entry[1]):
            stop(f"{path} line {number}: {entry[1]} is no host name and no IPv4 address")
        if entry[1] in slots:
            stop(f"{path} line {number}: {entry[1]} for the second time")
        slots[entry[1]] = int(entry[2])
    if len(slots) < 2:
        stop(f"{path} names {len(slots)} hosts: write HOST slots=N, one a line; scripts/run_local.sh is for one host")
    return slots


class Way(NamedTuple):
    """What leads from a host to MASTER_ADDR."""

    own: str  # yes: the address is this host's own
    interface: str
    source: str  # this host's address there
    infiniband: str  # yes: this host has such a device
    address: str  # what MASTER_ADDR resolves to


def survey(master_addr: str) -> Way:
    """Runs on this host, and on each host of a hostfile."""
    try:
        address = socket.getaddrinfo(master_addr, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        stop(f"MASTER_ADDR={master_addr} does not resolve ({error.strerror}): write the first host's address")
    if LOOPBACK.match(address) and master_addr != "localhost" and not LOOPBACK.match(master_addr):
        stop(f"MASTER_ADDR={master_addr} resolves to {address}, which other hosts cannot reach: write its address")
    try:
        route = subprocess.run(["ip", "-o", "route", "get", address], capture_output=True, text=True)
        words = route.stdout.split()
        if route.returncode != 0 or "dev" not in words:
            stop(f"no route to MASTER_ADDR={master_addr}: {route.stderr.strip() or route.stdout.strip()}")
        interface, own = words[words.index("dev") + 1], "yes" if words[0] == "local" else "no"
        if own == "yes":  # the route says lo; gloo and NCCL need the interface that holds the address
            lines = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True).stdout.splitlines()
            held = [fields[1] for fields in map(str.split, lines) if fields[3].split("/")[0] == address]
            interface = held[0] if held else interface
    except FileNotFoundError:
        stop("no ip command, which finds the interface: on Debian and Ubuntu apt-get install iproute2")
    source = words[words.index("src") + 1] if "src" in words else address
    infiniband = "yes" if any(INFINIBAND.glob("*")) else "no"
    return Way(own, interface, source, infiniband, address)


def inspect(master_addr: str, port: int) -> None:
    """Runs on a host of the hostfile: its versions, and its way to MASTER_ADDR; port is 0 where none is needed."""
    try:
        versions = [f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed")]
        socket.create_server(("", port)).close()
    except metadata.PackageNotFoundError as error:
        stop(f"no package {error.name}")
    except OSError as error:
        stop(f"MASTER_PORT={port}: {os.strerror(error.errno)}; end what uses it, or take another")
    print(", ".join(["Python " + sys.version.split()[0], *versions]))
    print(*survey(master_addr))


def ask(master_addr: str, port: str, start: list[str], hosts: list[str]) -> str:
    """The hosts' interfaces with commas, whether one has InfiniBand, and their versions. Sends this file to each host;
    only the first, where rank 0 will listen, is asked for the port."""
    folder, script, venv, python = map(shlex.quote, start)
    activate = f"source {venv} && " if start[2] else ""
    interfaces, infiniband, versions = {}, "no", ""
    for host in hosts:
        there = f"cd {folder} && ls {script} >/dev/null && {activate}{python} -I - inspect {shlex.quote(master_addr)}"
        there = shlex.join(["bash", "-c", f"{there} {port if host == hosts[0] else 0}"])
        ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", host, there]
        done = subprocess.run(ssh, input=Path(__file__).read_bytes(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        answer = done.stdout.decode(errors="replace").strip().splitlines() or ["no reason given"]
        if done.returncode == 255:
            stop(f"no ssh to {host}: {answer[-1].strip()}; it must work without a password or a question")
        if done.returncode != 0 or len(answer) < 2:
            stop(f"host {host}: {answer[-1].removeprefix('run_multihost.sh: ')}")
        way = Way(*answer[-1].split())
        if host == hosts[0] and way.own == "no":
            stop(f"MASTER_ADDR={master_addr} is no address of {host}, the hostfile's first host, where rank 0 starts")
        versions = versions or answer[-2]
        if answer[-2] != versions:
            stop(f"host {host} has {answer[-2]}, but {hosts[0]} has {versions}: install the same")
        interfaces[way.interface] = host
        infiniband = "yes" if "yes" in (infiniband, way.infiniband) else "no"
    return f"{','.join(interfaces)} {infiniband} {versions}"


def deepspeed_env() -> list[str]:
    """What pdsh has to hand on: the network's and the data's variables, then the user's own lines, which win.

    DeepSpeed itself takes PYTHON*, MV2*, UCX* and MLFLOW* along, and NCCL* where the launching host has a GPU.
    """
    ours = [name for name in sorted(os.environ) if re.match("NCCL_|GLOO_|HF_|GPTLIKE_CACHE$", name)]
    lines = [f"{name}={os.environ[name]}" for name in ours if "TOKEN" not in name and os.environ[name]]  # no secrets
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for path in (Path.home() / name, Path(name)):
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            if not line.strip() or line.lstrip().startswith("#"):
                continue  # legal in every such file but DeepSpeed's
            if not re.match(r"[A-Za-z_]\w*=", line):
                stop(f"{path}: {line} is not NAME=VALUE")
            lines.append(line)
    for line in lines:
        if not re.fullmatch(r"[\w@+=:,./ -]*", line, re.ASCII):
            stop(f"{line}: the shells of the other hosts would change this; leave such characters out")
    return lines


def is_gone(peer: socket.socket) -> bool:
    """Whether the other side has closed: a host that was stopped and started again comes a second time."""
    peer.setblocking(False)
    try:
        return not peer.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def read_card(peer: socket.socket) -> dict | None:
    """What a host says of itself; None for a stranger, such as a port scan."""
    peer.settimeout(2)
    try:
        card = json.loads(peer.makefile("rb").readline(5000))
        known = type(card["rank"]) is int and all(type(card[key]) is str for key in ("plan", "ranks", "host"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return card if known and card["rank"] > 0 else None


def listen(server: socket.socket, me: dict, hosts: int, seconds: int) -> tuple[str, str]:
    """Called by NODE_RANK 0. Returns what is wrong ("" for nothing) and the hosts with their ranks."""
    end = time.monotonic() + seconds
    cards, peers, tell, wrong = {0: me}, {}, [], ""
    while not wrong and hosts > 1:
        server.settimeout(max(0.01, end - time.monotonic()))
        try:
            peer = server.accept()[0]
        except TimeoutError:
            if missing := ", ".join(str(rank) for rank in range(hosts) if rank not in cards):
                wrong = f"no word from NODE_RANK {missing} within {seconds} s; {CAUSES.format(missing)}"
            break
        card = read_card(peer)
        if card is None:
            peer.close()
            continue
        rank = card["rank"]
        if card["plan"] != me["plan"]:
            here = f"{me['plan']} on {me['host']} (NODE_RANK 0)"
            wrong = f"{card['plan']} on {card['host']} (NODE_RANK {rank}), but {here}"
        elif rank in peers and not is_gone(peers[rank]):
            wrong = f"NODE_RANK={rank} twice, on {cards[rank]['host']} and on {card['host']}: give each host its own"
        cards[rank], peers[rank] = card, peer
        tell.append(peer)
        if len(cards) == hosts:
            end = time.monotonic() + GRACE_S
    table = ", ".join(f"{cards[rank]['host']} {cards[rank]['ranks']}" for rank in sorted(cards))
    for peer in tell:
        try:
            peer.setblocking(True)
            peer.sendall(json.dumps([wrong, table]).encode() + b"\n")
            peer.close()
        except OSError:
            continue  # it has gone away, and training will tell
    return wrong, table


def join(address: str, port: int, me: dict, hosts: int, seconds: int) -> tuple[str, str]:
    """Called by every other host; comes again until somebody answers. Returns the same as listen."""
    end = time.monotonic() + seconds
    while True:
        left = max(0.1, end - time.monotonic())
        try:
            with socket.create_connection((address, port), timeout=min(5, left)) as peer:
                if hosts == 0:
                    return "", ""
                peer.sendall(json.dumps(me).encode() + b"\n")
                peer.settimeout(left)
                wrong, table = json.loads(peer.makefile("rb").readline(100_000))
                return str(wrong), str(table)
        except OSError as error:
            reason = error.strerror or str(error)
        except (ValueError, TypeError):
            reason = "what listens there is not this script's NODE_RANK 0"
        if time.monotonic() + 0.1 > end:
            return f"no answer from {address}:{port} within {seconds} s ({reason}); {CAUSES.format(0)}", ""
        time.sleep(min(0.5, left))


def roll_call(address: str, port: int, me: dict, hosts: int, seconds: int) -> None:
    """Returns when all hosts are there and agreed, else stops with one message, the same on every host."""
    if hosts != 1 and (hosts, me["rank"]) != (0, 0):
        print(f"waiting at most {seconds} s (RDZV_TIMEOUT) for the other hosts, at {address}:{port}", flush=True)
    if me["rank"] != 0:
        wrong, table = join(address, port, me, hosts, seconds)
    else:
        try:  # on all interfaces, as torchrun will
            server = socket.create_server(("", port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        except OSError as error:
            reason = os.strerror(error.errno)
            stop(f"MASTER_PORT={port} on this host: {reason}; end what uses it, or give all hosts another one")
        with server:
            wrong, table = listen(server, me, hosts, seconds)
    if wrong:
        stop(wrong)
    if hosts > 0:
        print(f"all hosts are there, with their ranks: {ascii(table)[1:-1]}", flush=True)


def main() -> None:
    verb, *words = sys.argv[1:]
    if verb == "hostfile":
        print(*(f"{host} {slots}" for host, slots in read_hostfile(*words).items()), sep="\n")
    elif verb == "survey":
        print(*survey(*words))
    elif verb == "inspect":
        inspect(words[0], int(words[1]))
    elif verb == "ask":
        print(ask(*words[:2], words[2:6], words[6:]))
    elif verb == "deepspeed_env":
        print("".join(f"{line}\n" for line in deepspeed_env()), end="")  # no blank line
    else:
        address, port, rank, hosts, plan, ranks, seconds, *command = words
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        me = {"rank": int(rank), "plan": plan, "ranks": ranks, "host": socket.gethostname()}
        roll_call(address, int(port), me, int(hosts), int(seconds))
        os.execvp(command[0], command)


if __name__ == "__main__":
    main()
