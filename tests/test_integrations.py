"""examples/: the GPT under transformers' Trainer, Accelerate and Lightning, on configs/, beside our own scripts."""

import importlib.util
import json
import re
import shlex
import sys
from types import SimpleNamespace

import pytest
from conftest import BIN, ROOT, TINY, free_port, run

EXAMPLES = {name: ROOT / "examples" / f"with_{name}.py" for name in ("trainer", "accelerate", "lightning")}
DOCS = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
STEPS = 10
TOLERANCE = 0.005  # bf16; and Trainer and Lightning let biases and norms decay, too
OTHERS = ("zero3_offload",)
CASES = [("zero2", "trainer"), *(pytest.param("zero2", name, marks=pytest.mark.drill) for name in [*EXAMPLES][1:])]
CASES += [pytest.param(config, name, marks=pytest.mark.drill) for config in OTHERS for name in EXAMPLES]


def losses(name: str, config: str) -> list[float]:
    """The loss of each step of an example on two CPU ranks."""
    flags = TINY | {"dropout": 0, "max_steps": STEPS, "ds_config": ROOT / "configs" / f"{config}.json"}
    launch = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port()), str(EXAMPLES[name])]
    done = run([*launch, *(word for flag, value in flags.items() for word in (f"--{flag}", str(value)))])
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^step=(\d+) loss=(\d+\.\d{4})$", done.stdout, re.MULTILINE)
    assert [int(step) for step, _ in found] == list(range(1, STEPS + 1)), done.stdout
    return [float(loss) for _, loss in found]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "name"), CASES)
def test_an_example_has_the_losses_of_our_script(train, config, name):
    """Same weights, same samples, same learning rate: beside our script at every one of ten steps."""
    ours = train(config, ranks=2, dropout=0, max_steps=STEPS).metrics("loss")
    theirs = losses(name, config)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < TOLERANCE, (ours, theirs)
    assert theirs[0] - theirs[-1] > 5 * TOLERANCE  # or any two runs would lie within it


@pytest.fixture(scope="module")
def common():
    spec = importlib.util.spec_from_file_location("examples_common", ROOT / "examples" / "common.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example_commands(text: str) -> list[str]:
    return re.findall(r"^ *(torchrun .* examples/.*)$", text, re.MULTILINE)


def test_examples_are_at_most_60_lines_and_named_in_the_docs():
    for path in EXAMPLES.values():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
        assert any(path.name in line for line in example_commands(DOCS))


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_command_of_an_example_is_one(monkeypatch, common, name):
    lines = example_commands(DOCS) + example_commands(EXAMPLES[name].read_text(encoding="utf-8"))
    mine = [line.split(f"examples/with_{name}.py")[1] for line in lines if f"with_{name}.py" in line]
    started = []
    for words in mine:
        monkeypatch.setattr(sys, "argv", ["example", *shlex.split(words)])
        common.start(lambda args, config: started.append(args.max_steps), "title")
    assert started == [STEPS, STEPS]  # the page's and the docstring's


def config_of(tmp_path, content: object) -> str:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


GOOD = json.loads((ROOT / "configs" / "zero2.json").read_text())
BAD_INPUT = {
    "an unknown flag": (["--learning_rate", "1"], 2, "unrecognized arguments: --learning_rate 1"),
    "half a flag": (["--max", "3"], 2, "unrecognized arguments: --max 3"),
    "a word for a number": (["--n_layer", "two"], 2, "argument --n_layer: invalid int value: 'two'"),
    "heads that do not divide": (["--n_head", "5"], 2, "--d_model 768 is not a multiple of --n_head 5"),
    "no steps": (["--max_steps", "0"], 2, "--max_steps 0: must be above 0"),
    "no such JSON": (["--ds_config", "none.json"], 1, "--ds_config none.json holds no settings"),
    "not JSON": ("{", 1, "ds.json holds no settings: Expecting property name"),
    "a list": ("[]", 1, "ds.json holds no settings"),
    "no optimizer": ({**GOOD, "optimizer": {}}, 1, "ds.json has no betas, eps, lr, weight_decay: take a file of"),
    "no micro batch": (
        {key: value for key, value in GOOD.items() if key != "train_micro_batch_size_per_gpu"},
        1,
        "ds.json has no train_micro_batch_size_per_gpu: take a file of configs/",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message(tmp_path, monkeypatch, capsys, common, case):
    words, code, message = BAD_INPUT[case]
    words = words if isinstance(words, list) else ["--ds_config", config_of(tmp_path, words)]
    monkeypatch.setattr(sys, "argv", ["with_nothing.py", *words])
    with pytest.raises(SystemExit) as stop:
        common.start(lambda args, config: pytest.fail("it went on"), "title")
    if code == 2:
        assert (stop.value.code, capsys.readouterr().err.splitlines()[-1]) == (2, f"with_nothing.py: error: {message}")
    else:  # a text is printed to stderr, and the exit code is 1
        assert stop.value.code.startswith("with_nothing.py: error: --ds_config ") and message in stop.value.code
    monkeypatch.setattr(common, "RANK", 1)
    with pytest.raises(SystemExit) as stop:
        common.start(lambda args, config: pytest.fail("it went on"), "title")
    assert (stop.value.code, capsys.readouterr().err) == (code, "")  # the first rank has said it


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_data_that_is_not_there_is_one_message(tmp_path, name):
    done = run([sys.executable, str(EXAMPLES[name]), "--dataset", "nowhere"], cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"with_{name}.py: error: --dataset nowhere: no such folder; else write wikitext2 or sample"
    )
    assert "Traceback" not in done.stderr


def test_lightning_refuses_what_the_example_works_around():
    """The day these two pass, the example can lose CPUStrategy, or hand the JSON over as it is."""
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.strategies import DeepSpeedStrategy
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    strategy = DeepSpeedStrategy(accelerator=CPUAccelerator(), config=dict(GOOD))
    with pytest.raises(RuntimeError, match="only supported on CUDA GPUs but `CPUAccelerator` is used"):
        strategy.setup_environment()
    strategy._lightning_module = SimpleNamespace()
    with pytest.raises(MisconfigurationException, match="Do not set `gradient_accumulation_steps` in the DeepSpeed"):
        strategy._init_config_if_needed()
