"""Say before a run which host, port or interface is at fault: all hosts meet, name themselves, and time an all-reduce.

Start it on every host, here on the first of two. It names the hosts that do not come, and the usual causes:

    python scripts/tools/network_check.py --nnodes=2 --node_rank=0 --master_addr=172.25.0.100 --master_port=29500

or for all ranks of all hosts with the command of the run, this file in the place of the script. But torchrun waits for
every host itself, and where one is missing it ends in a stack trace that names none.
Rank 0 prints a row for each rank. Exit code 0: all have met, versions that differ are a warning; 1: they have not.
"""

import argparse
import json
import os
import platform
import socket
import sys
import time
from datetime import timedelta
from importlib import metadata

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else the store prints C++ stacks; what is wrong is said here
import psutil
import torch
import torch.distributed as dist
from common import table

ON_GPU = torch.cuda.is_available()
VERSIONS = ("Python", "torch", "deepspeed", "transformers")
CAUSES = """Usual causes, the likeliest first:
  the command was not started on every host, or with another number of hosts or a node rank given twice
  a firewall closes the port, or the ports above 1024 that ranks open to each other
  MASTER_ADDR is no address of the host of rank 0 that the others reach
  NCCL or gloo took another interface: export NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME on each host
  a host's own name resolves to 127.*: mend /etc/hosts, or export GLOO_SOCKET_IFNAME"""


def fail(message: str) -> None:
    print(f"FAIL: {message}. {CAUSES}", file=sys.stderr, flush=True)
    os._exit(1)  # at once: gloo's threads would wait for ranks that are elsewhere


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


def read_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=int, default=60, help="seconds to wait for the other ranks (60)")
    parser.add_argument("--mib", type=int, default=64, help="size of the all-reduce in MiB (64)")
    own = parser.add_argument_group("without torchrun, one rank for each host")
    for flag, kind in (("--nnodes", int), ("--node_rank", int), ("--master_addr", str), ("--master_port", int)):
        own.add_argument(flag, type=kind)
    args = parser.parse_args()
    if args.timeout < 1 or args.mib < 1:
        parser.error("--timeout and --mib run from 1")
    if "RANK" in os.environ:
        args.rank, args.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        args.master_addr, args.master_port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return args
    if None in (args.nnodes, args.node_rank, args.master_addr):
        parser.error("start it by torchrun, or give --nnodes, --node_rank and --master_addr")
    args.rank, args.world_size, args.master_port = args.node_rank, args.nnodes, args.master_port or 29500
    if not (0 <= args.rank < args.world_size and 0 < args.master_port < 65536):
        parser.error("--node_rank runs from 0 to below --nnodes, ports from 1 to 65535")
    return args


def way_to(address: str) -> str:
    """This host's interface and address that lead to another host."""
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 29500, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            source = probe.getsockname()[0]
    except OSError as error:
        return f"no route ({error})"
    for name, addresses in psutil.net_if_addrs().items():
        if source in [found.address for found in addresses]:
            return f"{name} {source}"
    return source


def describe(args: argparse.Namespace) -> dict[str, str]:
    """What can differ between hosts."""
    chosen = os.environ.get("NCCL_SOCKET_IFNAME" if ON_GPU else "GLOO_SOCKET_IFNAME")
    way = way_to(args.master_addr) + (f" (chosen: {chosen})" if chosen else "")
    facts = {"host": socket.gethostname(), "interface": way, "Python": platform.python_version()}
    for name in VERSIONS[1:]:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = "none"
    return facts | {"device": torch.cuda.get_device_name() if ON_GPU else "CPU"}


def roll_call(store: dist.Store, args: argparse.Namespace) -> list[dict]:
    """Each rank's description. Ends with the names of the ranks that do not come in time."""
    if store.add(f"network_check/taken/{args.rank}", 1) > 1:
        fail(f"rank {args.rank} came twice to {args.place}, now from {socket.gethostname()}")
    store.set(f"network_check/{args.rank}", json.dumps(describe(args)))
    keys = [f"network_check/{other}" for other in range(args.world_size)]
    try:
        store.wait(keys, timedelta(seconds=args.timeout))
        return [json.loads(store.get(key)) for key in keys]
    except RuntimeError:  # of the store, when the time is over
        here = {}
        for rank, key in enumerate(keys):
            try:
                if store.check([key]):
                    here[rank] = json.loads(store.get(key))["host"]
            except RuntimeError as error:  # rank 0 has ended, and the store with it
                fail(f"rank 0 at {args.place} is gone: {first_line(error)}")
        time.sleep(2 if args.rank == 0 else 0)  # the others ask, too
        missing = ", ".join(str(rank) for rank in range(args.world_size) if rank not in here)
        present = ", ".join(f"{rank} on {host}" for rank, host in here.items())
        fail(f"rank {missing} did not come to {args.place} within {args.timeout} s; there are rank {present}")


def show(rows: list[dict]) -> None:
    """The table, and versions that differ."""
    print(table(["rank", *rows[0]], [[str(rank), *row.values()] for rank, row in enumerate(rows)]), flush=True)
    for name in VERSIONS:
        found = {row["host"]: row[name] for row in rows}
        if len(set(found.values())) > 1:
            print(f"warn: {name} differs: {found}. Install the same on all hosts", flush=True)


def time_all_reduce(mib: int) -> float:
    """Seconds of one all-reduce, the best of five."""
    tensor = torch.zeros(mib * 2**18, device="cuda" if ON_GPU else "cpu")
    best = float("inf")
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        tensor[0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    args = read_args()
    args.place = f"{args.master_addr}:{args.master_port}"
    if ON_GPU:
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= gpus:
            sys.exit(f"FAIL: {socket.gethostname()} has {gpus} GPUs, too few for local rank {local_rank}")
        torch.cuda.set_device(local_rank)
    backend, seconds = "nccl" if ON_GPU else "gloo", timedelta(seconds=args.timeout)
    # Rank 0 listens, unless torchrun's agent does so already; the others come to it.
    serves = args.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(args.master_addr, args.master_port, None, serves, seconds, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        rank = f"rank {args.rank} on {socket.gethostname()} {'cannot listen at' if serves else 'does not reach'}"
        fail(f"{rank} {args.place} within {args.timeout} s: {first_line(error)}")
    rows = roll_call(store, args)
    if args.rank == 0:
        show(rows)
    if len({row["device"] == "CPU" for row in rows}) > 1:
        time.sleep(0 if args.rank else 2)  # the others read the store, too
        sys.exit(f"FAIL: torch sees a GPU on some hosts only: {[(row['host'], row['device']) for row in rows]}")
    try:
        group_store = dist.PrefixStore("network_check/group", store)
        dist.init_process_group(backend, store=group_store, rank=args.rank, world_size=args.world_size, timeout=seconds)
        best = time_all_reduce(args.mib)
    except RuntimeError as error:
        host, way = socket.gethostname(), rows[args.rank]["interface"]
        fail(f"the ranks have met, but {backend} does not connect rank {args.rank} on {host} by {way}: {error}")
    if args.rank == 0:
        sent = 2 * (args.world_size - 1) / args.world_size * args.mib * 2**20  # by each rank of a ring
        speed = f"all-reduce of {args.mib} MiB in {best * 1000:.1f} ms, {sent / best / 1e9:.2f} GB/s by each rank"
        print(f"ok: {args.world_size} ranks met at {args.place} by {backend}; {speed}", flush=True)
    dist.barrier()
    time.sleep(0 if args.rank else 1)  # the store ends last
    os._exit(0)  # gloo's threads can abort an interpreter that takes its time to end


if __name__ == "__main__":
    main()
