"""The drills of rehearse_multihost.sh, which calls this inside the network that it has made.

Each drill starts the tutorial's two torchrun commands, one on each host, does its harm, and checks what the user would
then see: messages, exit codes, losses. Exit code 0: all drills passed; 1: one failed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SCRIPT, JSON = "DeepSpeed-GPTLike-Multihosts.py", "configs/multihosts.json"
MASTER = "172.25.0.100"
STEPS, SAVE = 200, 50
FLAGS = f"""--dataset sample --tokenizer bpe:512 --n_layer 1 --n_head 2 --d_model 32 --block_size 32 --precision fp32
    --max_steps {STEPS} --log_interval 1 --save_interval {SAVE} --eval_interval 0 --timeout 30 --output_dir run
    """.split()


class Failed(Exception):
    """What a drill did not find."""


class Host:
    """One of the two: a holder process with the network and the name, and a folder that the other does not see."""

    def __init__(self, number: int, holder: int, folder: Path):
        self.number, self.holder, self.folder, self.name = number, holder, folder, f"node{number}"
        self.path = folder.with_name("host")  # the same folder as seen from there
        self.log = folder / "screen.log"
        for name in ("configs", "tmp"):
            (folder / name).mkdir()
        shutil.copy(ROOT / SCRIPT, folder)
        shutil.copy(ROOT / JSON, folder / "configs")

    def run(self, *words: str, **env: str) -> subprocess.Popen:
        """Start a command here; what it prints goes to the host's log."""
        print(f"  [{self.name}] {' '.join(words)}", flush=True)
        own = {"HF_HOME": str(self.path / "hf"), "HF_HUB_OFFLINE": "1", "TMPDIR": str(self.path / "tmp")}
        own |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        own |= {"GLOO_SOCKET_IFNAME": "eno1", "NCCL_SOCKET_IFNAME": "=eno1"}
        words = [*self.enter(), "env", "-C", str(self.path), *words]
        with self.log.open("w") as screen:
            return subprocess.Popen(words, env=os.environ | own | env, stdout=screen, stderr=subprocess.STDOUT)

    def enter(self) -> list[str]:
        return ["nsenter", "-t", str(self.holder), "--net", "--uts", "--mount"]

    def do(self, *words: str) -> bool:
        """Run a short command here; whether it went well."""
        return subprocess.run([*self.enter(), *words], capture_output=True).returncode == 0

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
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def metrics(self, folder: str = "run") -> dict[int, float]:
        """Loss by step."""
        path = self.folder / folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        return {record["step"]: record["loss"] for record in records if "loss" in record}


class Rehearsal:
    def __init__(self, hosts: list[Host], flags: list[str]):
        self.hosts, self.flags = hosts, FLAGS + flags
        self.undisturbed: dict[int, float] = {}

    def torchrun(self, host: Host, **env: str) -> subprocess.Popen:
        """The tutorial's command."""
        words = ["torchrun", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={host.number}"]
        words += [f"--master_addr={MASTER}", "--master_port=29500", SCRIPT]
        return host.run(*words, *self.flags, **env)

    def both(self, timeout: int = 120, **env: str) -> list[int]:
        """Start both hosts, env on the second one, and wait for their exit codes."""
        return self.wait([self.torchrun(self.hosts[0]), self.torchrun(self.hosts[1], **env)], timeout)

    def wait(self, launches: list[subprocess.Popen], timeout: int = 120) -> list[int]:
        end = time.monotonic() + timeout
        try:
            return [launch.wait(max(1, end - time.monotonic())) for launch in launches]
        except subprocess.TimeoutExpired:
            self.show()
            for host in self.hosts:
                host.die()
            raise Failed(f"still running after {timeout} s") from None

    def until_step(self, step: int, launches: list[subprocess.Popen]) -> None:
        while not any(launch.poll() is not None for launch in launches):
            if max(self.hosts[0].metrics(), default=0) >= step:
                return
            time.sleep(0.02)
        raise Failed(f"a host ended before step {step}")

    def show(self, pattern: str = "", lines: int = 12) -> None:
        """What is on the two screens: lines of the scripts themselves, or those that match."""
        for host in self.hosts:
            screen = host.screen().splitlines()
            found = [line for line in screen if re.search(pattern or "rror:|step=|resumed|finished", line)]
            for line in found[-lines:]:
                print(f"    {host.name}| {line[:400]}")
        sys.stdout.flush()

    def expect(self, text: str, *hosts: int) -> None:
        for number in hosts or (0,):
            if text not in self.hosts[number].screen():
                print(self.hosts[number].screen()[-3000:])
                raise Failed(f"node{number} does not say: {text}")

    def clear(self) -> None:
        for host in self.hosts:
            shutil.rmtree(host.folder / "run", ignore_errors=True)

    def reference(self) -> dict[int, float]:
        """The losses of two hosts that nothing disturbs, and their final weights."""
        if not self.undisturbed:
            self.clear()
            if self.both() != [0, 0]:
                print(self.hosts[0].screen()[-3000:], self.hosts[1].screen()[-3000:])
                raise Failed("the undisturbed run failed")
            self.undisturbed = self.hosts[0].metrics()
            self.weights = (self.hosts[0].folder / "run" / "model" / "model.safetensors").read_bytes()
            self.screen = self.hosts[0].screen()
        return self.undisturbed

    def same_as_undisturbed(self) -> None:
        """What was interrupted has the losses and the weights of what was not, to the last bit."""
        if self.hosts[0].metrics() != self.reference():
            raise Failed("the losses are not those of the undisturbed run")
        if (self.hosts[0].folder / "run" / "model" / "model.safetensors").read_bytes() != self.weights:
            raise Failed("the final weights are not those of the undisturbed run")

    def plain(self) -> str:
        """Both hosts train to the end; one host with two ranks gives the same losses."""
        two = self.reference()
        for text in ("world size 2", "a rank on node0: CPU", "a rank on node1: CPU"):
            if text not in self.screen:
                raise Failed(f"node0 does not say: {text}")
        single = ["torchrun", "--nproc_per_node=2", SCRIPT, *self.flags, "--output_dir", "single"]
        if self.wait([self.hosts[0].run(*single)]) != [0]:
            raise Failed("the single host failed")
        one = self.hosts[0].metrics("single")
        if two.keys() != one.keys() or len(two) != max(two):
            raise Failed("not every step is there")
        apart = max(abs(two[step] - one[step]) for step in two)
        if not apart <= 1e-5:
            raise Failed(f"losses of two hosts and of one are {apart:.1e} apart")
        return f"{len(two)} losses of two hosts and of one host with two ranks are at most {apart:.1e} apart"

    def host_lost(self) -> str:
        """node1 dies in the midst of training. node0 ends with a message; the same two commands continue."""
        self.reference()
        self.clear()
        launches = [self.torchrun(host) for host in self.hosts]
        self.until_step(SAVE + 20, launches)
        self.hosts[1].die()
        code = self.wait(launches[:1], 60)[0]
        self.show("peer|step=")
        if code == 0:
            raise Failed("node0 ended with 0")
        self.expect("by peer")
        if self.both() != [0, 0]:
            raise Failed("the second start failed")
        self.show("resumed")
        self.expect(f"resumed from step {SAVE} of run")
        self.same_as_undisturbed()
        return f"continued from step {SAVE}; losses and final weights are those of the undisturbed run"

    def host_missing(self) -> str:
        """node1 is never started: the run ends, and network_check.py on node0 says who is missing."""
        self.clear()
        site = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": MASTER, "RDZV_TIMEOUT": "5"}
        launch = ["bash", str(ROOT / "scripts" / "run_multihost.sh"), SCRIPT, *self.flags]
        code = self.wait([self.hosts[0].run(*launch, **site)], 60)[0]
        self.show("chose|waiting|joined")
        self.expect("1/2 clients joined")
        words = ["python", str(ROOT / "scripts" / "tools" / "network_check.py"), "--timeout", "5"]
        words += ["--nnodes=2", f"--master_addr={MASTER}"]
        missing = self.wait([self.hosts[0].run(*words, "--node_rank=0")], 60)[0]
        self.show("FAIL")
        self.expect(f"rank 1 did not come to {MASTER}:29500")
        codes = self.wait([host.run(*words, f"--node_rank={host.number}", "--mib=4") for host in self.hosts], 60)
        self.show("eno1|ok:")
        self.expect("eno1 172.25.0.200")
        self.expect("ok: 2 ranks met")
        if 0 in (code, missing) or codes != [0, 0]:
            raise Failed(f"exit codes {code}, {missing}, {codes}")
        return "the run ended; network_check.py named rank 1, and with both hosts the interface of each"

    def split_disks(self) -> str:
        """Stopped and continued where no host sees the other's disk; then a host has lost its disk."""
        self.reference()
        self.clear()
        launches = [self.torchrun(host) for host in self.hosts]
        self.until_step(SAVE + 20, launches)
        for launch in launches:
            launch.terminate()
        self.wait(launches, 60)
        self.show("stopped")
        self.expect("the same command continues")
        for host in self.hosts:
            parts = sorted(path.name for path in (host.folder / "run" / "checkpoints").glob("step*/*optim_states.pt"))
            if not parts or any(f"_rank_{host.number}_" not in part for part in parts):
                raise Failed(f"{host.name} holds {parts}")
        stopped = max(self.hosts[0].metrics())
        if self.both() != [0, 0]:
            raise Failed("the second start failed")
        self.show("resumed")
        self.same_as_undisturbed()
        shutil.rmtree(self.hosts[1].folder / "run")
        codes = self.both()
        self.show("error:")
        if 0 in codes:
            raise Failed("a host without its files trained on")
        self.expect("('node1', [])")
        return f"continued after step {stopped} exactly as undisturbed; a lost disk is refused"

    def version_mismatch(self) -> str:
        """node1 has another version of transformers."""
        self.clear()
        folder = self.hosts[1].folder / "other" / "transformers-9.9.9.dist-info"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.9.9\n")
        codes = self.both(PYTHONPATH=str(folder.parent))
        self.show("error:")
        if 0 in codes:
            raise Failed(f"exit codes {codes}")
        self.expect("transformers is 9.9.9 on host node1, but ", 0, 1)
        return "both hosts name the package and both versions"

    def elastic(self) -> str:
        """A rank of node1 is killed. torchrun starts all ranks again, and they go on from the last checkpoint."""
        self.reference()
        self.clear()
        site = {"NNODES": "2", "MASTER_ADDR": MASTER, "RDZV_TIMEOUT": "60"}
        words = ["bash", str(ROOT / "scripts" / "run_multihost.sh"), "--elastic", "--max-restarts", "2"]
        launches = [host.run(*words, SCRIPT, *self.flags, NODE_RANK=str(host.number), **site) for host in self.hosts]
        self.until_step(SAVE + 20, launches)
        workers = [process for process in self.hosts[1].processes() if SCRIPT in process.cmdline()[1:3]]
        workers[-1].kill()
        codes = self.wait(launches, 120)
        self.show("resumed|exitcode")
        if codes != [0, 0]:
            raise Failed(f"exit codes {codes}")
        self.expect(f"resumed from step {SAVE} of run")
        self.same_as_undisturbed()
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
        except Failed as error:
            failed.append(name)
            result = f"FAIL {name}: {error}"
        print(f"{result} ({time.monotonic() - start:.0f} s)", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
