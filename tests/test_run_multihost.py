"""run_multihost.sh, run_slurm.sh and hosts.py: the commands that they would run, what they choose and keep, what they
refuse, and two hosts on one machine for real. Elsewhere ssh, ip and Slurm are stubs."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from conftest import BIN, ROOT, TINY, free_port, load_script

MULTIHOSTS = "DeepSpeed-GPTLike-Multihosts.py"
FIRST, SECOND = "172.25.0.100", "172.25.0.200"
STUBS = {
    # the tutorial's first host, 172.25.0.100 on eno1, with a second network on docker0
    "ip": f"""case "$*" in
*"route get {FIRST}") echo "local {FIRST} dev lo table local src {FIRST} uid 0 \\    cache <local>" ;;
*"route get 127.0.0.1") echo "local 127.0.0.1 dev lo src 127.0.0.1 uid 0 \\    cache <local>" ;;
*"route get 203.0.113."*) echo "RTNETLINK answers: Network is unreachable" >&2; exit 2 ;;
*"route get fd00::9") echo "fd00::9 from :: dev eno6 proto kernel src fd00::1 metric 256 pref medium" ;;
*"route get "*) echo "$4 dev eno1 src {FIRST} uid 0 \\    cache" ;;
"-o addr") echo "1: lo    inet 127.0.0.1/8 scope host lo\\       valid_lft forever"
  echo "2: docker0    inet 172.17.0.1/16 scope global docker0\\       valid_lft forever"
  echo "3: eno1    inet {FIRST}/24 brd 172.25.0.255 scope global eno1\\       valid_lft forever" ;;
esac""",
    "nvidia-smi": "exit 9",
    "pdsh": "exit 9",
}


def stub(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def launch(tmp_path: Path):
    """A function that runs a shell script of scripts/ on the tutorial's first host, in a folder with one script."""
    stubs, site = tmp_path / "stubs", tmp_path / "site"
    for name, text in STUBS.items():
        stub(stubs, name, text)
    shutil.copytree(ROOT / "scripts", site / "scripts")
    (site / "train.py").write_text("")

    def run(*words: str, script: str = "run_multihost.sh", **env: str) -> subprocess.CompletedProcess:
        kept = {"HOME": str(tmp_path), "PATH": f"{stubs}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.run(
            ["bash", f"scripts/{script}", *words],
            cwd=site, env=kept | env, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    run.site, run.stubs = site, stubs
    return run


def last_command(result: subprocess.CompletedProcess) -> list[str]:
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line for line in result.stdout.splitlines() if line.startswith("+ ")]
    assert len(lines) == 1
    return shlex.split(lines[0])[1:]


TUTORIAL = "torchrun --nnodes=2 --nproc_per_node=1 --node_rank={} --master_addr=172.25.0.100 --master_port=29500"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_tutorials_commands(launch, rank):
    result = launch(
        "--dry_run", "train.py", "--ds_config", "ds_config.json", "--n_layer", "6", MASTER_ADDR=FIRST, NODE_RANK=rank
    )
    words = TUTORIAL.format(rank).split()
    assert last_command(result) == [*words, "train.py", "--ds_config", "ds_config.json", "--n_layer", "6"]


@pytest.mark.parametrize(
    ("flags", "env", "command"),
    [
        (["--no_roll_call"], {"NODE_RANK": "0"}, f"{TUTORIAL.format(0)} --rdzv_conf=timeout=300"),
        (["--"], {"NODE_RANK": "3", "NNODES": "4", "GPUS_PER_HOST": "8", "MASTER_PORT": "29501"},
         "torchrun --nnodes=4 --nproc_per_node=8 --node_rank=3 --master_addr=172.25.0.100 --master_port=29501"),
        (["--elastic", "--max-restarts", "3"], {"RDZV_ID": "job-7"},
         "torchrun --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_endpoint=172.25.0.100:29500 "
         "--rdzv_id=job-7 --rdzv_conf=is_host=1,join_timeout=300,read_timeout=300 --local_addr=172.25.0.100 "
         "--max-restarts=3"),
        (["--elastic"], {"MASTER_ADDR": SECOND, "NNODES": "1:4", "RDZV_TIMEOUT": "9"},
         "torchrun --nnodes=1:4 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_endpoint=172.25.0.200:29500 "
         "--rdzv_id=gptlike --rdzv_conf=is_host=0,join_timeout=9,read_timeout=9 --local_addr=172.25.0.100"),
        (["--elastic"], {"NODE_RANK": "1"},
         "torchrun --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_endpoint=172.25.0.100:29500 "
         "--rdzv_id=gptlike --rdzv_conf=is_host=0,join_timeout=300,read_timeout=300 --local_addr=172.25.0.100"),
        (["--launcher", "deepspeed", "--hostfile", "hosts"], {},
         "deepspeed --hostfile hosts --master_addr 172.25.0.100 --master_port 29500"),
        (["--launcher=deepspeed", "--hostfile=hosts", "--venv_script=/env/bin/activate"], {"MASTER_ADDR": ""},
         "deepspeed --hostfile hosts --master_addr 172.25.0.100 --master_port 29500 --venv_script /env/bin/activate"),
        (["--launcher", "deepspeed", "--no_ssh", "--hostfile", "hosts"], {"NODE_RANK": "1"},
         "deepspeed --hostfile hosts --no_ssh --node_rank 1 --master_addr 172.25.0.100 --master_port 29500"),
    ],
)  # fmt: skip
def test_other_commands(launch, flags, env, command):
    shutil.copy(ROOT / "configs" / "hostfile.example", launch.site / "hosts")
    separator = flags[-1:] if flags[-1] == "--" else []
    flags = [flag for flag in flags if flag != "--"]
    result = launch("--dry_run", *flags, *separator, "train.py", "--lr", "1e-3", **({"MASTER_ADDR": FIRST} | env))
    assert last_command(result) == [*command.split(), "train.py", "--lr", "1e-3"]


@pytest.mark.parametrize(
    ("gpus", "env", "ranks"),
    [
        (0, {}, 1), (4, {}, 4), (4, {"GPUS_PER_HOST": "2"}, 2), (4, {"CUDA_VISIBLE_DEVICES": "0,2"}, 2),
        (4, {"CUDA_VISIBLE_DEVICES": ""}, 1),
    ],
)  # fmt: skip
def test_ranks_per_host(launch, gpus, env, ranks):
    stub(launch.stubs, "nvidia-smi", "\n".join(f"echo 'GPU {n}: NVIDIA H100 (UUID: GPU-{n})'" for n in range(gpus)))
    words = last_command(launch("--dry_run", "train.py", MASTER_ADDR=FIRST, NODE_RANK="0", **env))
    assert words[2] == f"--nproc_per_node={ranks}"


@pytest.mark.parametrize(
    ("address", "rank", "interface"), [(FIRST, "0", "eno1"), (SECOND, "1", "eno1"), ("127.0.0.1", "0", "lo"),
                                       ("fd00::9", "1", "eno6")],
)  # fmt: skip
def test_the_interface_that_leads_to_the_master(launch, address, rank, interface):
    lines = launch("--dry_run", "train.py", MASTER_ADDR=address, NODE_RANK=rank).stdout.splitlines()
    assert lines[0] == f"chose NCCL_SOCKET_IFNAME=={interface}: it leads to {address}"  # NCCL: = is exact
    assert lines[1] == f"chose GLOO_SOCKET_IFNAME={interface}: it leads to {address}"


@pytest.mark.parametrize("name", ["NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_DISABLE"])
@pytest.mark.parametrize("value", ["0", "docker0", ""])
def test_what_the_user_set_is_kept(launch, name, value):
    infiniband(launch, present=False)
    result = launch("--dry_run", "train.py", MASTER_ADDR=FIRST, NODE_RANK="0", **{name: value})
    assert f"kept {name}={value}, since it was set\n" in result.stdout
    assert f"chose {name}" not in result.stdout
    assert result.stdout.count("chose ") == 2


def infiniband(launch, *, present: bool) -> None:
    """Let the copy of the scripts look for devices in a folder of this test."""
    devices = launch.site / "infiniband"
    devices.mkdir()
    if present:
        (devices / "mlx5_0").mkdir()
    tool = launch.site / "scripts" / "hosts.py"
    text = tool.read_text()
    assert text.count('"/sys/class/infiniband"') == 1
    tool.write_text(text.replace('"/sys/class/infiniband"', f'"{devices}"'))


@pytest.mark.parametrize("present", [True, False])
def test_infiniband_is_switched_off_only_where_there_is_none(launch, present):
    infiniband(launch, present=present)
    result = launch("--dry_run", "train.py", MASTER_ADDR=FIRST, NODE_RANK="0")
    assert ("chose NCCL_IB_DISABLE=1" in result.stdout) is not present


def test_what_was_chosen_reaches_the_command_and_its_exit_code_comes_back(launch):
    infiniband(launch, present=False)
    stub(launch.stubs, "torchrun", 'printf "%s\\n" "$@"; env | grep -E "^(NCCL|GLOO)_" | sort; exit 7')
    words = ["$(touch hacked)", "a b", "", "*", "'", "; touch hacked"]
    env = {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0", "NNODES": "1", "MASTER_PORT": str(free_port())}
    result = launch("train.py", *words, **env)
    assert result.returncode == 7
    assert result.stdout.split("train.py\n", 2)[-1].splitlines() == [
        *words, "GLOO_SOCKET_IFNAME=lo", "NCCL_IB_DISABLE=1", "NCCL_SOCKET_IFNAME==lo"
    ]  # fmt: skip
    assert not (launch.site / "hacked").exists()


GOOD = {"MASTER_ADDR": FIRST, "NODE_RANK": "0"}
DEEPSPEED = ["--launcher", "deepspeed"]
BAD = [
    # flags, environment over GOOD, exit code, beginning of the message
    (["--fast", "train.py"], {}, 2, "unknown flag --fast; the training script's own flags come after its name"),
    ([], {}, 2, "no such script: (none given)"),
    (["other.py"], {}, 2, "no such script: other.py"),
    (["--", "-x.py"], {}, 2, "no such script: -x.py"),
    (["--launcher"], {}, 2, "--launcher needs a value"),
    (["--launcher", "ssh", "train.py"], {}, 2, "--launcher is torchrun or deepspeed"),
    (["--no_ssh", "train.py"], {}, 2, "--launcher is torchrun or deepspeed, and --no_ssh is for deepspeed only"),
    ([*DEEPSPEED, "--elastic", "train.py"], {}, 2, "--elastic does not go with the pdsh launch"),
    ([*DEEPSPEED, "--no_ssh", "--venv_script", "a", "train.py"], {}, 2, "--venv_script does not go with the no_ssh"),
    (["--hostfile", "hosts", "train.py"], {}, 2, "--hostfile does not go with the static launch"),
    (["--max-restarts", "3", "train.py"], {}, 2, "--max-restarts does not go with the static launch"),
    (["--elastic", "--max-restarts", "x", "train.py"], {}, 2, "--max-restarts=x is no number from 0 to 9999"),
    (["--elastic", "train.py"], {"RDZV_ID": "a b"}, 2, "RDZV_ID=a b"),
    (["--elastic", "train.py"], {"NNODES": "4:2"}, 2, "NNODES=2 is no number from 4 to 9999"),
    (["train.py"], {"MASTER_ADDR": ""}, 2, "MASTER_ADDR= is no address: write the first host's"),
    (["train.py"], {"MASTER_ADDR": "-oProxyCommand=x"}, 2, "MASTER_ADDR=-oProxyCommand=x is no address"),
    (["train.py"], {"MASTER_ADDR": "$(touch hacked)"}, 2, "MASTER_ADDR=$(touch hacked) is no address"),
    (["train.py"], {"MASTER_ADDR": "a b"}, 2, "MASTER_ADDR=a b is no address"),
    (["train.py"], {"MASTER_ADDR": "no-such-host.invalid"}, 1, "MASTER_ADDR=no-such-host.invalid does not resolve"),
    (["train.py"], {"MASTER_ADDR": SECOND}, 1, f"MASTER_ADDR={SECOND} is not this host ({FIRST}), but NODE_RANK=0 m"),
    (["--elastic", "train.py"], {"MASTER_ADDR": SECOND}, 1, f"MASTER_ADDR={SECOND} is not this host"),
    (["train.py"], {"MASTER_ADDR": "203.0.113.9", "NODE_RANK": "1"}, 1,
     "no route to MASTER_ADDR=203.0.113.9: RTNETLINK answers: Network is unreachable"),
    (["train.py"], {"NODE_RANK": ""}, 2, "NODE_RANK= is no number from 0 to 1"),
    (["train.py"], {"NODE_RANK": "2"}, 2, "NODE_RANK=2 is no number from 0 to 1"),
    (["train.py"], {"NODE_RANK": "-1"}, 2, "NODE_RANK=-1 is no number from 0 to 1"),
    (["train.py"], {"NODE_RANK": "one"}, 2, "NODE_RANK=one is no number from 0 to 1"),
    (["train.py"], {"NODE_RANK": "a[$(touch hacked)]"}, 2, "NODE_RANK=a[$(touch hacked)] is no number from 0 to 1"),
    (["train.py"], {"NODE_RANK": "01"}, 2, "NODE_RANK=01 is no number"),
    (["train.py"], {"NNODES": "0"}, 2, "NNODES=0 is no number from 1 to 9999"),
    (["train.py"], {"NNODES": "1:2"}, 2, "NNODES=1:2 is no number from 1 to 9999"),
    (["train.py"], {"NNODES": "two"}, 2, "NNODES=two is no number"),
    (["train.py"], {"GPUS_PER_HOST": "0"}, 2, "GPUS_PER_HOST=0 is no number from 1 to 9999"),
    (["train.py"], {"GPUS_PER_HOST": "all"}, 2, "GPUS_PER_HOST=all is no number"),
    (["train.py"], {"MASTER_PORT": "65536"}, 2, "MASTER_PORT=65536 is no number from 1 to 65535"),
    (["train.py"], {"MASTER_PORT": "http"}, 2, "MASTER_PORT=http is no number"),
    (["train.py"], {"RDZV_TIMEOUT": "0"}, 2, "RDZV_TIMEOUT=0 is no number from 1"),
    ([*DEEPSPEED, "train.py"], {}, 1, "no hostfile configs/hostfile: copy configs/hostfile.example there"),
    ([*DEEPSPEED, "--hostfile", "hosts", "train.py"], {"NNODES": "3"}, 2, "NNODES=3, but hosts names 2 hosts"),
    ([*DEEPSPEED, "--hostfile", "hosts", "train.py"], {"CUDA_VISIBLE_DEVICES": "0,2"}, 2, "the deepspeed launcher"),
    ([*DEEPSPEED, "--hostfile", "hosts", "train.py", "$(touch hacked)"], {}, 2, "'$(touch hacked)': with pdsh"),
    ([*DEEPSPEED, "--hostfile", "hosts", "train.py", "%h"], {}, 2, "'%h': with pdsh the shells of the hosts would"),
    ([*DEEPSPEED, "--hostfile", "hosts", "train.py", ""], {}, 2, "'': with pdsh the shells of the hosts would"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "env", "code", "message"), BAD)
def test_bad_input_ends_with_one_message(launch, words, env, code, message):
    (launch.site / "hosts").write_text(f"{FIRST} slots=1\n{SECOND} slots=1\n")
    stub(launch.stubs, "torchrun", "echo started")
    for dry_run in ([], ["--dry_run"]):
        result = launch(*dry_run, *words, **(GOOD | env))
        assert result.returncode == code, result.stdout + result.stderr
        assert result.stderr.startswith(f"run_multihost.sh: {message}")
        assert result.stderr.count("\n") == 1
        assert "started" not in result.stdout
    assert not (launch.site / "hacked").exists()


def test_a_name_that_is_loopback_here_is_refused(launch):
    """Debian's /etc/hosts gives a host's own name 127.0.1.1: no other host could come there."""
    tool = launch.site / "scripts" / "hosts.py"
    resolve = 'socket.getaddrinfo = lambda *words, **more: [(0, 0, 0, "", ("127.0.1.1", 0))]\n'
    tool.write_text(tool.read_text().replace("\nCAUSES =", f"\n{resolve}\nCAUSES =", 1))
    result = launch("train.py", MASTER_ADDR="gpu1", NODE_RANK="0")
    message = "MASTER_ADDR=gpu1 resolves to 127.0.1.1, which other hosts cannot reach: write its address"
    assert (result.returncode, result.stderr) == (1, f"run_multihost.sh: {message}\n")


HOSTFILES = [
    (f"{FIRST} slots=2\n{SECOND} slots=1\n", ""),
    (f"# two hosts\n\n  # indented\n{FIRST}\tslots=2 # the first\r\n  {SECOND}   slots=1", ""),
    (f"user@{FIRST} slots=2\ngpu-2.example_1 slots=1\n", ""),
    ("", "hosts names 0 hosts"),
    ("# none\n", "hosts names 0 hosts"),
    (f"{FIRST} slots=2\n", "hosts names 1 hosts: write HOST slots=N, one a line; scripts/run_local.sh is for one host"),
    (f"{FIRST}\n", f"hosts line 1: {FIRST} is not HOST slots=N, N at least 1, with nothing else but a # comment"),
    (f"\n{FIRST} slots=\n", f"hosts line 2: {FIRST} slots= is not HOST slots=N"),
    (f"{FIRST} slots=0\n", f"hosts line 1: {FIRST} slots=0 is not HOST slots=N"),
    (f"{FIRST} slots=x\n", f"hosts line 1: {FIRST} slots=x is not HOST slots=N"),
    (f"{FIRST} slots=2x\n", f"hosts line 1: {FIRST} slots=2x is not HOST slots=N"),
    (f"{FIRST} slots = 2\n", f"hosts line 1: {FIRST} slots = 2 is not HOST slots=N"),
    (f"{FIRST} slots=2 max_slots=4\n", f"hosts line 1: {FIRST} slots=2 max_slots=4 is not HOST slots=N"),
    (f"{FIRST} slots=2# first\n", f"hosts line 1: {FIRST} slots=2# first is not HOST slots=N"),
    (f"// first\n{FIRST} slots=2\n", "hosts line 1: // first is not HOST slots=N"),
    (f"; first\n{FIRST} slots=2\n", "hosts line 1: ; first is not HOST slots=N"),
    (f"{FIRST} # slots=2\n", f"hosts line 1: {FIRST} # slots=2 is not HOST slots=N"),
    (f"{FIRST} slots=2\n{FIRST} slots=1\n", f"hosts line 2: {FIRST} for the second time"),
    ("-oProxyCommand=touch slots=2\n", "hosts line 1: -oProxyCommand=touch is no host name and no IPv4 address"),
    ("$(touch) slots=2\n", "hosts line 1: $(touch) is no host name and no IPv4 address"),
    ("gpu[1-3] slots=2\n", "hosts line 1: gpu[1-3] is no host name and no IPv4 address"),
    ("ssh:gpu1 slots=2\n", "hosts line 1: ssh:gpu1 is no host name and no IPv4 address"),
    ("-l@gpu1 slots=2\n", "hosts line 1: -l@gpu1 is no host name and no IPv4 address"),
]


@pytest.mark.parametrize(("text", "message"), HOSTFILES)
def test_hostfiles(launch, text, message):
    (launch.site / "hosts").write_text(text)
    result = launch("--dry_run", *DEEPSPEED, "--hostfile", "hosts", "train.py", MASTER_ADDR=FIRST)
    if message:
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith(f"run_multihost.sh: {message}")
        assert result.stderr.count("\n") == 1
    else:
        assert last_command(result)[0] == "deepspeed"


@pytest.mark.slow
def test_deepspeed_reads_what_is_accepted_alike():
    from deepspeed.launcher.runner import _parse_hostfile

    example = (ROOT / "configs" / "hostfile.example").read_text()
    assert dict(_parse_hostfile(example.splitlines(keepends=True))) == {FIRST: 2, SECOND: 1}
    for text, message in HOSTFILES:
        if not message:
            assert list(_parse_hostfile(text.splitlines(keepends=True)).values()) == [2, 1]


SSH = """[[ "$*" != *" hostname" ]] || exit 0 # DeepSpeed's own check
host=${5:?}
echo "$*" | head -1 >> ssh.log
case "$host" in
  refused) echo "ssh: connect to host refused port 22: Connection refused" >&2; exit 255 ;;
  locked) echo "Warning: Permanently added" >&2; echo "me@locked: Permission denied (publickey)." >&2; exit 255 ;;
  nopython) echo "bash: line 1: /opt/python: No such file or directory"; exit 127 ;;
  oldtorch) echo "Python 3.11.99, torch 2.5.0, deepspeed 0.19.8"; echo "no eno1 172.25.0.9 no 172.25.0.100" ;;
  elsewhere) echo "Python 3.11.99, torch 2.13.0, deepspeed 0.19.8"; echo "no eno1 172.25.0.9 no 172.25.0.100" ;;
  other-name) echo "Python 3.11.99, torch 2.13.0, deepspeed 0.19.8"; echo "no enp3s0 172.25.0.9 yes 172.25.0.100" ;;
  first) echo "Python 3.11.99, torch 2.13.0, deepspeed 0.19.8"; echo "yes eno1 172.25.0.100 no 172.25.0.100" ;;
  real) exec bash -c "$6" ;;
esac"""


@pytest.fixture
def hosts(launch):
    """The same with stubs of ssh and deepspeed: DeepSpeed's prints the variables that pdsh would have to hand on."""
    infiniband(launch, present=False)
    stub(launch.stubs, "ssh", SSH)
    show = 'echo started "$@"; env | grep ^NCCL | sort; echo "env file:"; cat "$DS_ENV_FILE"; exit 3'
    stub(launch.stubs, "deepspeed", show)

    def run(*names: str, **env: str) -> subprocess.CompletedProcess:
        (launch.site / "hosts").write_text("".join(f"{name} slots=1\n" for name in names))
        return launch(*DEEPSPEED, "--hostfile", "hosts", "train.py", **({"MASTER_ADDR": FIRST} | env))

    run.launch = launch
    return run


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["first", "refused"], "no ssh to refused: ssh: connect to host refused port 22: Connection refused; it must"),
        (["locked", "first"], "no ssh to locked: me@locked: Permission denied (publickey).; it must work without"),
        (["first", "nopython"], "host nopython: bash: line 1: /opt/python: No such file or directory"),
        (["first", "oldtorch"], "host oldtorch has Python 3.11.99, torch 2.5.0, deepspeed 0.19.8, but first has "),
        (["elsewhere", "first"], f"MASTER_ADDR={FIRST} is no address of elsewhere, the hostfile's first host, "),
        (["first", "real"], "host real has Python 3."),
    ],
)
def test_hosts_are_asked_first(hosts, names, message):
    result = hosts(*names)
    assert result.returncode == 1
    assert result.stderr.startswith(f"run_multihost.sh: {message}")
    assert result.stderr.count("\n") == 1
    assert "started" not in result.stdout
    asked = (hosts.launch.site / "ssh.log").read_text().splitlines()
    assert all(line.startswith("-o BatchMode=yes -o ConnectTimeout=5 ") for line in asked)


def test_the_hosts_answers_choose_the_network(hosts):
    own = hosts.launch.site / ".deepspeed_env"
    own.write_text("# mine\n\nHF_HOME=/data/hf\n")
    result = hosts("first", "elsewhere", HF_HUB_OFFLINE="1", HF_TOKEN="secret", HF_HOME="/tmp/hf")
    assert (result.returncode, result.stderr) == (3, "")  # deepspeed's own exit code
    before, started = result.stdout.split("started ")
    assert "all hosts answer: Python 3.11.99, torch 2.13.0, deepspeed 0.19.8\n" in before
    assert started.splitlines() == [
        f"--hostfile hosts --master_addr {FIRST} --master_port 29500 train.py",
        "NCCL_IB_DISABLE=1", "NCCL_SOCKET_IFNAME==eno1",
        "env file:", "GLOO_SOCKET_IFNAME=eno1", "HF_HOME=/tmp/hf", "HF_HUB_OFFLINE=1",
        "NCCL_IB_DISABLE=1", "NCCL_SOCKET_IFNAME==eno1", "HF_HOME=/data/hf",
    ]  # fmt: skip
    assert own.read_text() == "# mine\n\nHF_HOME=/data/hf\n"


@pytest.mark.slow
def test_deepspeed_hands_on_what_was_chosen(hosts):
    """DeepSpeed itself, with a stub of pdsh: the hosts, the exported variables and the command for each of them."""
    (hosts.launch.stubs / "deepspeed").unlink()
    stub(hosts.launch.stubs, "pdsh", 'printf "<%s>" "$@"; echo; exit 4')
    (hosts.launch.site / ".deepspeed_env").write_text("# mine\n\nHF_HOME=/data/hf\n")
    result = hosts("first", "elsewhere", HF_HUB_OFFLINE="1")
    assert result.returncode == 4, result.stderr
    pdsh = [line for line in result.stdout.splitlines() if line.startswith("<-S>")][0]
    assert "<-w><first,elsewhere>" in pdsh
    for variable in ("NCCL_SOCKET_IFNAME==eno1", "GLOO_SOCKET_IFNAME=eno1", "HF_HOME=/data/hf", "HF_HUB_OFFLINE=1"):
        assert f"export {variable}; " in pdsh
    assert f"<--node_rank=%n><--master_addr={FIRST}><--master_port=29500>" in pdsh
    assert pdsh.endswith("<train.py>")


@pytest.mark.slow
def test_a_stopped_launcher_leaves_nothing_behind(launch):
    """SIGTERM while it waits: the port is free again."""
    port = free_port()
    process = roll_call(launch, 0, port)
    wait_for(port)
    process.terminate()
    process.communicate(timeout=10)
    with socket.create_server(("", port)):
        pass


def test_other_interface_names_and_infiniband(hosts):
    result = hosts("first", "other-name")
    assert "chose NCCL_SOCKET_IFNAME==eno1,enp3s0: the hosts' own way to 172.25.0.100\n" in result.stdout
    assert "chose no GLOO_SOCKET_IFNAME: it is one name for all hosts, and theirs are eno1,enp3s0\n" in result.stdout
    assert "NCCL_IB_DISABLE" not in result.stdout
    assert result.stdout.endswith("env file:\nNCCL_SOCKET_IFNAME==eno1,enp3s0\n")


@pytest.mark.parametrize("line", ["HF_HOME", "HF_HOME=$(touch hacked)", "export A=1"])
def test_a_bad_deepspeed_env_is_refused(hosts, line):
    (hosts.launch.site / ".deepspeed_env").write_text(f"{line}\n")
    result = hosts("first", "elsewhere")
    assert result.returncode == 1 and line in result.stderr and result.stderr.count("\n") == 1
    assert "started" not in result.stdout


def test_what_a_host_is_asked_for_real(hosts):
    """What goes over ssh, run by a shell here: this environment's versions, and the stub's way to 172.25.0.100."""
    port = str(free_port())
    python = hosts.launch.site / "scripts" / "hosts.py"
    words = [str(BIN / "python"), "-I", str(python), "ask", FIRST]
    run = {"cwd": hosts.launch.site, "capture_output": True, "text": True, "timeout": 60}
    env = os.environ | {"PATH": f"{hosts.launch.stubs}{os.pathsep}{os.environ['PATH']}"}
    site, start = str(hosts.launch.site), [str(BIN / "python"), "real"]
    done = subprocess.run([*words, port, site, "train.py", "", *start], env=env, **run)
    assert re.fullmatch(r"eno1 no Python 3\.\d+\.\d+, torch 2\.\S+, deepspeed 0\.\S+\n", done.stdout), done.stderr
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run([*words, port, site, "train.py", "", *start], env=env, **run)
        assert done.stderr.startswith(f"run_multihost.sh: host real: MASTER_PORT={port}: Address already in use")
    for change, message in (
        ([site, "other.py", "", *start], "other.py"),
        (["/no folder", "train.py", "", *start], "/no folder"),
        ([site, "train.py", "/no/activate", *start], "/no/activate"),
        ([site, "train.py", "", "/no/python", "real"], "/no/python"),
    ):
        done = subprocess.run([*words, "0", *change], env=env, **run)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
        assert done.stderr.startswith("run_multihost.sh: host real: ")


def roll_call(launch, rank: int, port: int, *flags: str, **env: str) -> subprocess.Popen:
    stub(launch.stubs, "torchrun", "echo started")
    stub(launch.stubs, "deepspeed", "echo started")
    variables = {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": str(rank), "MASTER_PORT": str(port), "RDZV_TIMEOUT": "10"}
    kept = {"PATH": f"{launch.stubs}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}", "HOME": str(launch.site)}
    words = ["bash", "scripts/run_multihost.sh", *flags, "train.py"]
    return subprocess.Popen(words, cwd=launch.site, env=kept | variables | env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def outcomes(*processes: subprocess.Popen) -> list[tuple[int, str, str]]:
    ends = [process.communicate(timeout=60) for process in processes]
    return [(process.returncode, *end) for process, end in zip(processes, ends, strict=True)]


@pytest.mark.slow
def test_roll_call_finds_all_hosts(launch):
    port, name = free_port(), socket.gethostname()
    first = roll_call(launch, 0, port, NNODES="3", GPUS_PER_HOST="3")
    others = [roll_call(launch, rank, port, NNODES="3", GPUS_PER_HOST="1") for rank in (1, 2)]
    with socket.create_connection(("127.0.0.1", wait_for(port)), timeout=5) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        for code, output, errors in outcomes(first, *others):
            assert (code, errors) == (0, "")
            assert output.endswith(f"all hosts are there, with their ranks: {name} 3, {name} 1, {name} 1\nstarted\n")


def wait_for(port: int) -> int:
    """The port, as soon as something listens there."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return port
        time.sleep(0.05)
    raise AssertionError(f"nothing listens at {port}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "env", "message"),
    [
        ((0, 1, 1), [{}, {}, {}], "NODE_RANK=1 twice, on {host} and on {host}: give each host its own"),
        ((0, 1), [{"NNODES": "2"}, {"NNODES": "3"}],
         "NNODES=3 on {host} (NODE_RANK 1), but NNODES=2 on {host} (NODE_RANK 0)"),
        ((0, 2), [{"NNODES": "2"}, {"NNODES": "3"}],
         "NNODES=3 on {host} (NODE_RANK 2), but NNODES=2 on {host} (NODE_RANK 0)"),
        ((0, 1), [{"NNODES": "3"}, {"NNODES": "2"}],
         "NNODES=2 on {host} (NODE_RANK 1), but NNODES=3 on {host} (NODE_RANK 0)"),
    ],
)  # fmt: skip
def test_roll_call_names_what_differs(launch, ranks, env, message):
    """All hosts end, with the same message, and none of them starts anything."""
    port = free_port()
    ends = outcomes(*(roll_call(launch, rank, port, **more) for rank, more in zip(ranks, env, strict=True)))
    for code, output, errors in ends:
        assert (code, errors) == (1, f"run_multihost.sh: {message.format(host=socket.gethostname())}\n")
        assert "started" not in output


@pytest.mark.slow
def test_roll_call_compares_the_hostfiles_where_each_host_starts_itself(launch):
    port = free_port()
    for name, slots in (("a", 1), ("b", 2)):
        (launch.site / name).write_text(f"{FIRST} slots=1\n{SECOND} slots={slots}\n")
    flags = [*DEEPSPEED, "--no_ssh", "--hostfile"]
    ends = outcomes(roll_call(launch, 0, port, *flags, "a"), roll_call(launch, 1, port, *flags, "b"))
    for code, _, errors in ends:
        assert code == 1
        assert f"hosts {FIRST} 1 {SECOND} 2 on " in errors and f", but hosts {FIRST} 1 {SECOND} 1 on " in errors


CAUSES = ["{} is not started", "a firewall", "a wrong MASTER_ADDR or interface", "unequal NNODES or MASTER_PORT"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "flags", "message"),
    [
        (1, [], "no answer from 127.0.0.1:{port} within 1 s (Connection refused)"),
        (1, ["--elastic"], "no answer from 127.0.0.1:{port} within 1 s (Connection refused)"),
        (0, [], "no word from NODE_RANK 1 within 1 s"),
    ],
)
def test_a_missing_host_ends_the_waiting(launch, rank, flags, message):
    port = free_port()
    [(code, output, errors)] = outcomes(roll_call(launch, rank, port, *flags, RDZV_TIMEOUT="1"))
    assert code == 1
    assert f"waiting at most 1 s (RDZV_TIMEOUT) for the other hosts, at 127.0.0.1:{port}\n" in output
    missing = f"NODE_RANK {0 if rank else 1}"
    causes = "; ".join(CAUSES).format(missing)
    assert errors.startswith(f"run_multihost.sh: {message.format(port=port)}; usual causes, in this order: {causes}")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--elastic"]])
def test_a_port_in_use_is_named(launch, flags):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        [(code, _, errors)] = outcomes(roll_call(launch, 0, port, *flags))
    assert code == 1
    found = f"run_multihost.sh: MASTER_PORT={port} on this host: Address already in use"
    assert errors == f"{found}; end what uses it, or give all hosts another one\n"


@pytest.mark.slow
def test_something_else_at_the_masters_port(launch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        threading.Thread(target=greet, args=(other,), daemon=True).start()
        [(code, _, errors)] = outcomes(roll_call(launch, 1, port, RDZV_TIMEOUT="1"))
    assert code == 1 and "(what listens there is not this script's NODE_RANK 0)" in errors


def greet(server: socket.socket) -> None:
    try:
        while True:
            with server.accept()[0] as peer:
                peer.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
    except OSError:
        return


@pytest.mark.slow
def test_a_host_that_was_stopped_may_come_again():
    """It holds its NODE_RANK only as long as it is connected."""
    hosts, port = load_script("scripts/hosts.py"), free_port()
    cards = [{"rank": rank, "plan": "p", "ranks": "1", "host": f"h{rank}"} for rank in range(3)]
    answers = []
    with socket.create_server(("127.0.0.1", port)) as server:
        listener = threading.Thread(target=lambda: answers.append(hosts.listen(server, cards[0], 3, 10)))
        listener.start()
        with socket.create_connection(("127.0.0.1", port)) as stopped:
            stopped.sendall(b'{"rank": 1, "plan": "p", "ranks": "1", "host": "old"}\n')
            time.sleep(0.2)
        joined = [threading.Thread(target=hosts.join, args=("127.0.0.1", port, card, 3, 10)) for card in cards[1:]]
        for thread in joined:
            thread.start()
        for thread in (*joined, listener):
            thread.join()
    assert answers == [("", "h0 1, h1 1, h2 1")]


def test_run_slurm_prints_the_srun_command(launch):
    stub(launch.stubs, "scontrol", '[[ "$*" == "show hostnames gpu[1-3]" ]] && printf "gpu1\\ngpu2\\ngpu3\\n"')
    slurm = {"SLURM_JOB_NODELIST": "gpu[1-3]", "SLURM_SUBMIT_DIR": str(launch.site)}
    words = last_command(launch("--dry_run", "train.py", "a b", script="run_slurm.sh", **slurm))
    assert words[:5] == ["srun", "--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    assert words[5:7] == ["bash", "-c"]
    assert words[8:] == ["torchrun", "--nnodes=3", "--master_addr=gpu1", "--master_port=29500", "train.py", "a b"]


def test_run_slurm_starts_one_torchrun_on_each_node(launch):
    stub(launch.stubs, "scontrol", 'printf "gpu1\\ngpu2\\n"')
    each = 'for node in 0 1; do SLURM_NODEID=$node SLURM_GPUS_ON_NODE=$((node + 3)) "${@:5}"; done; exit 5'
    stub(launch.stubs, "srun", each)
    stub(launch.stubs, "torchrun", 'printf "<%s>" "$@"; echo')
    copied = launch.site.parent / "slurm_script"  # sbatch runs a copy from its spool folder
    shutil.copy(ROOT / "scripts" / "run_slurm.sh", copied)
    env = {"PATH": f"{launch.stubs}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_NODELIST": "gpu[1-2]"}
    for ranks, more in ((["3", "4"], {}), (["2", "2"], {"GPUS_PER_HOST": "2"})):
        result = subprocess.run(
            ["bash", copied, "train.py", "$(touch hacked)", "a b"], capture_output=True, text=True, timeout=60,
            cwd="/", env=env | {"SLURM_SUBMIT_DIR": str(launch.site)} | more,
        )  # fmt: skip
        assert (result.returncode, result.stderr) == (5, "")
        rest = "<--nnodes=2><--master_addr=gpu1><--master_port=29500><train.py><$(touch hacked)><a b>"
        expected = [f"<--nproc_per_node={count}><--node_rank={node}>{rest}" for node, count in enumerate(ranks)]
        assert result.stdout.splitlines()[1:] == expected
    assert not (launch.site / "hacked").exists()


@pytest.mark.parametrize(
    ("words", "env", "code", "message"),
    [
        ([], {}, 2, "no such script in {site}: (none given)"),
        (["other.py"], {}, 2, "no such script in {site}: other.py"),
        (["train.py"], {"SLURM_JOB_NODELIST": ""}, 1, "this is no Slurm job: sbatch scripts/run_slurm.sh train.py"),
        (["train.py"], {"MASTER_PORT": "0"}, 2, "MASTER_PORT=0 is no port"),
        (["train.py"], {"GPUS_PER_HOST": "x"}, 2, "GPUS_PER_HOST=x is no number of ranks"),
        (["train.py"], {"NAMES": "-x"}, 1, "scontrol names no first node: '-x'"),
        (["train.py"], {"NAMES": ""}, 1, "scontrol names no first node: ''"),
    ],
)
def test_run_slurm_refuses(launch, words, env, code, message):
    stub(launch.stubs, "scontrol", 'printf "%s\\n" "${NAMES-gpu1}"')
    result = launch(*words, script="run_slurm.sh", **({"SLURM_JOB_NODELIST": "gpu1"} | env))
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr == f"run_slurm.sh: {message.format(site=launch.site)}\n"


def test_run_slurm_says_how_it_was_tested():
    assert "TESTED WITH STUBS of srun and scontrol only" in (ROOT / "scripts" / "run_slurm.sh").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "second"), [([], "1"), pytest.param(["--elastic"], "1", marks=pytest.mark.drill),
                                               pytest.param([], "2", marks=pytest.mark.drill),
                                               ([*DEEPSPEED, "--no_ssh", "--hostfile", "hosts"], "")])  # fmt: skip
def test_two_hosts_train(tmp_path, flags, second):
    """Two commands on this machine, as on two hosts; also with 1 and 2 ranks, which torchrun adds up."""
    port, folder = str(free_port()), tmp_path / "run"
    flags = [str(tmp_path / "hosts") if flag == "hosts" else flag for flag in flags]
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    training = TINY
    training += ["--max_steps=3", "--log_interval=1", "--precision=fp32", f"--output_dir={folder}"]
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RDZV_TIMEOUT": "60"}
    hosts = [
        subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "run_multihost.sh"), *flags, MULTIHOSTS, *training], cwd=ROOT, text=True,
            env=env | ({"NODE_RANK": rank} | ({"GPUS_PER_HOST": ranks} if ranks else {})),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank, ranks in (("0", second and "1"), ("1", second))
    ]  # fmt: skip
    outputs = [host.communicate(timeout=200)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs[0] + outputs[1]
    assert f"world size {1 + int(second or 1)}, hosts " in outputs[0] + outputs[1]
    assert (folder / "model" / "model.safetensors").is_file()
    assert ("all hosts are there" in outputs[0]) is ("--elastic" not in flags)
