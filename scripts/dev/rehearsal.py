"""The drills of rehearse_multihost.sh, which calls this inside the network that it has made.

Each drill starts the tutorial's two torchrun commands, one on each host, does its harm, and checks what the user would
then see: messages, exit codes, losses. Exit code 0: all drills passed; 1: one failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from common import ROOT, SCRIPTS, ToolError, launch_environment, read_metrics

SCRIPT = SCRIPTS[-1]
MASTER = "172.25.0.100"
STEPS, SAVE = 100, 25
FLAGS = f"""--dataset sample --tokenizer bpe:512 --n_layer 1 --n_head 2 --d_model 32 --block_size 32 --precision fp32
    --max_steps {STEPS} --log_interval 1 --save_interval {SAVE} --eval_interval 0 --timeout 30 --output_dir run
    """.split()


class Host:
    """One of the two: a holder process with the network and the name, and a folder that the other does not see."""

    def __init__(self, number: int, holder: int, folder: Path):
        self.number, self.holder, self.folder, self.name = number, holder, folder, f"node{number}"
        self.path = folder.with_name("host")  # the same folder as seen from there
        self.log = folder / "screen.log"
        self.log.touch()
        (folder / "configs").mkdir()
        (folder / "tmp").mkdir()
        shutil.copy(ROOT / SCRIPT, folder)
        shutil.copy(ROOT / "configs/multihosts.json", folder / "configs")

    def run(self, *words: str, **env: str) -> subprocess.Popen:
        """Start a command here; what it prints goes to the host's log."""
        print(f"  [{self.name}] {' '.join(words)}", flush=True)
        own = {"HF_HOME": str(self.path / "hf"), "TMPDIR": str(self.path / "tmp")}
        own |= {"GLOO_SOCKET_IFNAME": "eno1", "NCCL_SOCKET_IFNAME": "=eno1"}
        cores = sorted(os.sched_getaffinity(0))
        half = ",".join(map(str, cores[self.number :: 2] or cores))  # each host has cores of its own
        enter = ["taskset", "-c", half, "nsenter", "-t", str(self.holder), "--net", "--uts", "--mount"]
        enter += ["env", "-C", str(self.path)]
        with self.log.open("w") as screen:
            env = launch_environment(gpus=False, **own, **env)
            return subprocess.Popen([*enter, *words], env=env, stdout=screen, stderr=screen)

    def processes(self) -> list[psutil.Process]:
        network, found = os.readlink(f"/proc/{self.holder}/ns/net"), []
        for process in psutil.process_iter():
            try:
                if process.pid != self.holder and os.readlink(f"/proc/{process.pid}/ns/net") == network:
                    found.append(process)
            except OSError:
                continue  # it ended by itself
        return found

    def die(self) -> None:
        """As when the power fails: everything on this host is gone at once."""
        for process in self.processes():
            process.kill()

    def screen(self) -> str:
        return self.log.read_text(errors="replace")

    def losses(self, folder: str = "run") -> dict[int, float]:
        if not (self.folder / folder / "metrics.jsonl").exists():
            return {}
        return {step: fields["loss"] for step, fields in read_metrics(self.folder / folder).items()}


class Rehearsal:
    def __init__(self, hosts: list[Host], flags: list[str]):
        self.hosts, self.flags = hosts, FLAGS + flags
        self.undisturbed = None  # losses and final weights

    def torchrun(self, host: Host, **env: str) -> subprocess.Popen:
        """The tutorial's command."""
        words = ["torchrun", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={host.number}"]
        words += [f"--master_addr={MASTER}", "--master_port=29500", SCRIPT]
        return host.run(*words, *self.flags, **env)

    def by_script(self, host: Host, timeout: str, *words: str) -> subprocess.Popen:
        """The same by run_multihost.sh."""
        site = {"NNODES": "2", "NODE_RANK": str(host.number), "MASTER_ADDR": MASTER, "RDZV_TIMEOUT": timeout}
        return host.run("bash", str(ROOT / "scripts/run_multihost.sh"), *words, SCRIPT, *self.flags, **site)

    def check_network(self, host: Host, seconds: int) -> subprocess.Popen:
        words = ["--nnodes=2", f"--node_rank={host.number}", f"--master_addr={MASTER}", f"--timeout={seconds}"]
        return host.run("python", str(ROOT / "scripts/tools/network_check.py"), *words)

    def both(self, well: bool = True, **second: str) -> None:
        self.wait([self.torchrun(self.hosts[0]), self.torchrun(self.hosts[1], **second)], well)

    def wait(self, launches: list[subprocess.Popen], well: bool = True, seconds: float = 300) -> None:
        """All have to end in time, and all well or all badly."""
        end = time.monotonic() + seconds
        try:
            codes = [launch.wait(max(1, end - time.monotonic())) for launch in launches]
        except subprocess.TimeoutExpired:
            for host in self.hosts:
                host.die()
            raise ToolError(f"still running after {seconds} s") from None
        if any((code == 0) != well for code in codes):
            raise ToolError(f"exit codes {codes}")

    def expect(self, text: str, *hosts: int) -> None:
        """Print the line of the first host, or of those, that says this."""
        for host in [self.hosts[number] for number in hosts or (0,)]:
            lines = [line for line in host.screen().splitlines() if text in line]
            if not lines:
                raise ToolError(f"{host.name} does not say: {text}")
            print(f"    {host.name}| {lines[0][:400]}", flush=True)

    def outcome(self) -> tuple[dict[int, float], bytes]:
        node0 = self.hosts[0]
        return node0.losses(), (node0.folder / "run/model/model.safetensors").read_bytes()

    def train_undisturbed(self) -> None:
        """Once, for all drills."""
        if self.undisturbed is None:
            self.both()
            for text in ("world size 2", "a rank on node0: CPU", "a rank on node1: CPU"):
                self.expect(text)
            self.undisturbed = self.outcome()

    def interrupt(self, start, *words: str) -> list[subprocess.Popen]:
        """Start both hosts, and return in the midst of their steps."""
        self.train_undisturbed()
        for host in self.hosts:
            shutil.rmtree(host.folder / "run", ignore_errors=True)
        launches = [start(host, *words) for host in self.hosts]
        while max(self.hosts[0].losses(), default=0) < SAVE + 20:
            if any(launch.poll() is not None for launch in launches):
                raise ToolError("a host ended by itself")
            time.sleep(0.02)
        return launches

    def has_resumed(self, step: int) -> None:
        self.expect(f"resumed from step {step} of run")
        if self.outcome() != self.undisturbed:
            raise ToolError("losses and final weights are not, to the last bit, those of the undisturbed run")

    def plain(self) -> str:
        """Both hosts train to the end; one host with two ranks gives the same losses."""
        self.train_undisturbed()
        words = ["torchrun", "--nproc_per_node=2", SCRIPT, *self.flags, "--output_dir", "single"]
        self.wait([self.hosts[0].run(*words)])
        two, one = self.undisturbed[0], self.hosts[0].losses("single")
        if two.keys() != one.keys() or len(two) != max(two):
            raise ToolError("not every step is there")
        apart = max(abs(two[step] - one[step]) for step in two)
        if not apart <= 1e-5:
            raise ToolError(f"losses of two hosts and of one are {apart:.1e} apart")
        return f"{len(two)} losses of two hosts and of one host with two ranks are at most {apart:.1e} apart"

    def host_lost(self) -> str:
        """node1 dies in the midst of training. node0 ends with a message; the same two commands continue."""
        launches = self.interrupt(self.torchrun)
        self.hosts[1].die()
        self.wait(launches, well=False, seconds=60)
        self.expect("by peer")
        self.both()
        self.has_resumed(SAVE)
        return f"continued from step {SAVE}; losses and final weights are those of the undisturbed run"

    def host_missing(self) -> str:
        """node1 is never started: the run ends, and network_check.py on node0 says who is missing."""
        self.wait([self.by_script(self.hosts[0], "5")], well=False, seconds=60)
        self.expect("1/2 clients joined")
        self.wait([self.check_network(self.hosts[0], 5)], well=False, seconds=60)
        self.expect(f"rank 1 did not come to {MASTER}:29500")
        self.wait([self.check_network(host, 60) for host in self.hosts])
        self.expect("eno1 172.25.0.200")
        self.expect("ok: 2 ranks met")
        return "the run ended; network_check.py named rank 1, and with both hosts the interface of each"

    def split_disks(self) -> str:
        """Stopped and continued where no host sees the other's disk; then a host has lost its disk."""
        launches = self.interrupt(self.torchrun)
        for launch in launches:
            launch.terminate()
        self.wait(launches, well=False)
        self.expect("the same command continues")
        for host in self.hosts:
            parts = sorted(path.name for path in host.folder.glob("run/checkpoints/step*/*optim_states.pt"))
            if not parts or any(f"_rank_{host.number}_" not in part for part in parts):
                raise ToolError(f"{host.name} holds {parts}")
        stopped = max(self.hosts[0].losses())
        self.both()
        self.has_resumed(stopped)
        shutil.rmtree(self.hosts[1].folder / "run")
        self.both(well=False)
        self.expect("('node1', [])")
        return f"continued after step {stopped} exactly as undisturbed; a lost disk is refused"

    def version_mismatch(self) -> str:
        """node1 has another version of transformers."""
        package = self.hosts[1].folder / "other" / "transformers-9.9.9.dist-info"
        package.mkdir(parents=True)
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.9.9\n")
        self.both(well=False, PYTHONPATH=str(package.parent))
        self.expect("transformers is 9.9.9 on host node1, but ", 0, 1)
        return "both hosts name the package and both versions"

    def elastic(self) -> str:
        """A rank of node1 is killed. torchrun starts all ranks again, and they go on from the last checkpoint."""
        launches = self.interrupt(self.by_script, "60", "--elastic", "--max-restarts", "2")
        workers = [process for process in self.hosts[1].processes() if SCRIPT in process.cmdline()[1:3]]
        workers[-1].kill()
        self.wait(launches)
        self.has_resumed(SAVE)
        return "restarted; losses and final weights are those of the undisturbed run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--hosts", type=int, nargs=2, required=True, metavar="PID")
    parser.add_argument("--drills", nargs="+", required=True)
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()
    hosts = [Host(number, pid, args.folder / f"node{number}") for number, pid in enumerate(args.hosts)]
    rehearsal, failed = Rehearsal(hosts, args.flags), []
    for name in args.drills:
        drill = getattr(rehearsal, name.replace("-", "_"))
        print(f"== {name}: {' '.join(drill.__doc__.split())}", flush=True)
        start = time.monotonic()
        try:
            result = f"PASS {name}: {drill()}"
        except (ToolError, OSError, LookupError, psutil.Error) as error:
            for host in hosts:
                print(f"{host.name} says:\n{host.screen()[-3000:]}")
            failed.append(name)
            result = f"FAIL {name}: {error!r}"
        print(f"{result} ({time.monotonic() - start:.0f} s)", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
