"""docs/scale.md: each table is what its command prints; configs/pytorchjob.yaml agrees with itself and the parsers.

python tests/test_scale.py      run every command of the page again, and put what it prints into the page
"""

import re
import shlex
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, load_script
from test_readme import check_command

PAGE = ROOT / "docs" / "scale.md"
COMMAND = re.compile(r"^```bash\n(.*?)```\n", re.MULTILINE | re.DOTALL)
TABLE = r"\n(?:\|.*\n)+"
PRINTED = re.compile(
    rf"\n[\d,]+ parameters; .*\nactivations .*\n{TABLE}\n(?:The first|Nothing) .*\n(?:\n(?:A step|Scaling).*\n{TABLE})*"
)


def commands() -> list[str]:
    """All of the page, one a line."""
    text = "\n".join(COMMAND.findall(PAGE.read_text(encoding="utf-8"))).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip()]


def output(command: str) -> str:
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.mark.parametrize("command", commands())
def test_every_command_is_one(command):
    check_command(command)


PLANS = [command for command in commands() if "plan_memory.py" in command]


@pytest.mark.parametrize("command", PLANS)
def test_each_table_is_what_the_command_above_it_prints(command):
    assert f"```bash\n{command}\n```\n\n{output(command)}" in PAGE.read_text(encoding="utf-8")


def test_every_table_has_its_command():
    page = PAGE.read_text(encoding="utf-8")
    assert (
        len(PRINTED.findall(page)) == len(PLANS) == len(re.findall(r"^activations of a rank", page, re.MULTILINE)) >= 6
    )


def test_links_lead_somewhere():
    page = PAGE.read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", page, re.M)
    }
    for target in re.findall(r"\]\((.+?)\)", page):
        assert target[1:] in anchors if target.startswith("#") else (PAGE.parent / target).exists(), target
    for name in re.findall(r"`((?:scripts|configs|tests|docs)/[\w./-]+)`", page):
        assert (ROOT / name).exists(), name


# The manifest. Names and types are those of the PyTorchJob CRD and of a pod, as far as they are used.
QUANTITY = r"[0-9]+(Ki|Mi|Gi|Ti)?"
SPEC = {
    "runPolicy": {"backoffLimit": int, "cleanPodPolicy": ("None", "Running", "All")},
    "pytorchReplicaSpecs": {
        role: {
            "replicas": int,
            "restartPolicy": ("Always", "OnFailure", "Never", "ExitCode"),
            "template": {
                "metadata": {"annotations": {"sidecar.istio.io/inject": str}},
                "spec": {
                    "terminationGracePeriodSeconds": int,
                    "containers": [
                        {"name": str, "image": str, "workingDir": str, "command": [str], "args": [str],
                         "env": [{"name": str, "value": str}],
                         "resources": {"limits": {"nvidia.com/gpu": int, "memory": QUANTITY}},
                         "volumeMounts": [{"name": str, "mountPath": str}]}
                    ],
                    "volumes": [
                        {"name": str, "emptyDir": {"medium": ("", "Memory"), "sizeLimit": QUANTITY},
                         "persistentVolumeClaim": {"claimName": str}}
                    ],
                },
            },
        }
        for role in ("Master", "Worker")
    },
}  # fmt: skip
SCHEMA = {"apiVersion": ("kubeflow.org/v1",), "kind": ("PyTorchJob",), "metadata": {"name": str, "namespace": str}}
SCHEMA |= {"spec": SPEC}


def faults(value: object, schema: object, path: str = "") -> list[str]:
    """Where a value is not of its schema: a type, a tuple of values, a pattern, or a list or dict of such."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{path} is no object"]
        unknown = [f"{path}.{key} is unknown" for key in value if key not in schema]
        known = (faults(item, schema[key], f"{path}.{key}") for key, item in value.items() if key in schema)
        return unknown + [fault for found in known for fault in found]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path} is no list"]
        return [fault for index, item in enumerate(value) for fault in faults(item, schema[0], f"{path}[{index}]")]
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{path} is {value!r}, no {schema.__name__}"]
    sound = value in schema if isinstance(schema, tuple) else re.fullmatch(schema, str(value))
    return [] if sound else [f"{path} is {value!r}"]


@pytest.fixture
def job() -> dict:
    return yaml.safe_load((ROOT / "configs" / "pytorchjob.yaml").read_text(encoding="utf-8"))


def test_the_manifest_is_of_its_schema(job):
    assert faults(job, SCHEMA) == []


@pytest.mark.parametrize(
    ("keys", "value", "fault"),
    [
        (["spec", "runPolicy", "cleanPodPolici"], "None", ".spec.runPolicy.cleanPodPolici is unknown"),
        (["spec", "runPolicy", "backoffLimit"], "10", ".spec.runPolicy.backoffLimit is '10', no int"),
        (["kind"], "TFJob", ".kind is 'TFJob'"),
        (["spec", "pytorchReplicaSpecs", "Slave"], {}, ".spec.pytorchReplicaSpecs.Slave is unknown"),
        (["spec", "pytorchReplicaSpecs"], [], ".spec.pytorchReplicaSpecs is no object"),
    ],
)
def test_a_wrong_manifest_would_be_found(job, keys, value, fault):
    place = job
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    assert faults(job, SCHEMA) == [fault]


@pytest.mark.parametrize("role", ["Master", "Worker"])
def test_the_numbers_of_the_manifest_agree(job, role):
    from torch.distributed.run import get_args_parser

    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert sorted(replicas) == ["Master", "Worker"] and replicas["Master"]["replicas"] == 1
    pod = replicas[role]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch" and container["command"] == ["torchrun"]
    variables = {"RANK": "1", "MASTER_ADDR": "gptlike-master-0", "MASTER_PORT": "23456"}
    args = [re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], word) for word in container["args"]]
    check_command(shlex.join(["torchrun", *args]))
    launch = get_args_parser().parse_args(args)
    assert int(launch.nnodes) == sum(replica["replicas"] for replica in replicas.values())
    assert int(launch.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert 30 < launch.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]} and "/dev/shm" in mounts.values()
    script = load_script(launch.training_script).build_parser().parse_args(launch.training_script_args)
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    for path in (script.output_dir, variables["HF_HOME"], variables["GPTLIKE_CACHE"]):
        assert path.startswith(f"{mounts['runs']}/")


def test_the_page_counts_the_manifest(job):
    def count(value: object) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return 1 + sum(count(item) for item in inner)

    assert f"all of its {count(job)} fields and values" in PAGE.read_text(encoding="utf-8")


def rewrite() -> None:
    page = PRINTED.sub("", PAGE.read_text(encoding="utf-8"))
    for command in dict.fromkeys(PLANS):
        block = f"```bash\n{command}\n```\n"
        assert page.count(block) == 1, command
        page = page.replace(block, f"{block}\n{output(command)}")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    rewrite()
