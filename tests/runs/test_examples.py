"""examples/: other ways to divide the GPT have GPTLike-Base.py's losses; configs/variants/ train as the page says."""

import json
import re
from pathlib import Path

import lint_config
import pytest
import torch
from conftest import BASE, OFFLOAD, PATIENT, ROOT, ZERO2, ZERO3, load_script, losses, run_script, script_args

pytestmark = pytest.mark.drill
SHAPE = """--dataset sample --tokenizer bpe:300 --n_layer 2 --n_head 4 --d_model 32 --block_size 32 --dropout 0
    --max_steps 6""".split()
SEQUENCES = 8  # of a step, on all ranks
VARIANTS = ROOT / "configs" / "variants"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The losses of Base in fp32, and its run."""
    output = tmp_path_factory.mktemp("base") / "run"
    flags = ["--precision", "fp32", "--batch_size", SEQUENCES, "--log_interval", 1]
    assert run_script(BASE, *SHAPE, *flags, "--output_dir", output).returncode == 0
    return output


def example(name, folder, *words, ranks=2, **settings):
    """What an example prints in fp32 on so many ranks; settings change its JSON."""
    config = json.loads((ROOT / "configs" / "zero1.json").read_text()) | {"bf16": {"enabled": False}} | settings
    (folder / "ds.json").write_text(json.dumps(config))
    done = run_script(f"examples/{name}.py", *SHAPE, "--ds_config", folder / "ds.json", *words, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses_in(text):
    return {int(step): float(loss) for step, loss in re.findall(r"^step=(\d+) loss=(\S+)", text, re.MULTILINE)}


def held_in(text):
    """Bytes of parameters and of optimizer states, by rank."""
    found = re.findall(r"^rank \d+, .*: (\S+) bytes of parameters, (\S+) of", text, re.MULTILINE)
    return [tuple(int(number.replace(",", "")) for number in pair) for pair in found]


@pytest.mark.parametrize(
    ("name", "words", "ranks", "sequences", "stage", "share"),
    [
        ("pipeline_parallel", ["--stages", 2, "--micro_batches", 4], 2, 2, 1, 0.66),
        ("pipeline_parallel", ["--stages", 2, "--micro_batches", 4], 4, 1, 1, 0.66),
        ("tensor_parallel", ["--tensor_ranks", 2], 2, 8, 1, 0.7),
        ("tensor_parallel", ["--tensor_ranks", 2], 2, 8, 3, 0.7),
        ("sequence_parallel", [], 2, 8, 1, 1.0),
        ("sequence_parallel", [], 2, 8, 3, 0.6),
        ("mixture_of_experts", ["--experts", 1, "--expert_ranks", 1, "--capacity", 0, "--balance", 0], 2, 4, 1, 1.01),
    ],
)
def test_a_divided_model_has_the_losses_of_base(name, words, ranks, sequences, stage, share, base, tmp_path):
    """share: the part of Base's weights that a rank may hold at most."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    settings = {"train_micro_batch_size_per_gpu": sequences, "zero_optimization": zero}
    said = example(name, tmp_path, *words, ranks=ranks, **settings)
    assert losses_in(said) == pytest.approx(losses(base), abs=1e-4)
    parameters = 4 * json.loads((base / "args.json").read_text())["n_params"]
    held = held_in(said)
    assert len(held) == ranks and max(weights for weights, _ in held) <= share * parameters


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_sequence_on_two_ranks_has_the_gradient_of_base(stage, tmp_path):
    """Adam would not show a gradient that is twice as large, clipping would."""
    script = load_script(BASE)
    args = script_args(script, *SHAPE, "--precision", "fp32", "--batch_size", str(SEQUENCES))
    corpus = script.load_corpus(args)
    torch.manual_seed(args.seed)
    model = script.GPTLike(args, corpus.vocab_size)
    blocks = corpus.streams["train"].unfold(0, args.block_size + 1, args.block_size)
    model(*next(script.micro_batches(blocks, 0, args))).backward()
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()]).item()
    settings = {"train_micro_batch_size_per_gpu": SEQUENCES, "zero_optimization": {"stage": stage}}
    said = example("sequence_parallel", tmp_path, **settings)
    found = re.search(r"^step=1 loss=\S+ gradient_norm=(\S+)$", said, re.MULTILINE)
    assert float(found[1]) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_experts_train_and_count_tokens(stage, tmp_path):
    settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
    said = example("mixture_of_experts", tmp_path, "--max_steps", 20, **settings)
    found = losses_in(said)
    assert found[20] < found[1] - 0.1
    counts = [json.loads(text) for text in re.findall(r"tokens_per_expert=(.*)", said)]
    assert all(sum(layer) == SEQUENCES * 32 and len(layer) == 4 for step in counts for layer in step)


def test_inference_gives_equal_logits_and_text(base, tmp_path):
    export = run_script("scripts/tools/export_hf.py", base, tmp_path / "gpt2", "--skip_evaluation")
    assert export.returncode == 0, export.stderr
    done = run_script("examples/inference.py", tmp_path / "gpt2", "--max_new_tokens", 8)
    assert "logits differ by 0.0e+00 at most; the text is equal" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("name", "ranks", "words", "message"),
    [
        ("pipeline_parallel", 4, ["--stages", 3], "--stages 3 does not divide ranks 4"),
        ("pipeline_parallel", 2, ["--ds_config", "configs/zero2.json"], "take a JSON of stage 1 or below"),
        ("mixture_of_experts", 3, [], "--expert_ranks 2 does not divide ranks 3"),
        ("mixture_of_experts", 2, ["--n_layer", 1], "every second block has experts: take --n_layer 2 or more"),
        ("mixture_of_experts", 2, ["--experts", 3], "--expert_ranks 2 does not divide experts 3"),
        ("mixture_of_experts", 2, ["--ds_config", "configs/zero3.json"], "take a JSON of stage 2 or below"),
        ("tensor_parallel", 2, ["--n_head", 3], "--tensor_ranks 2 does not divide n_head 3"),
        ("sequence_parallel", 1, [], "sequence parallelism needs more than one rank"),
    ],
)
def test_wrong_ranks_and_stages(name, ranks, words, message):
    done = run_script(f"examples/{name}.py", *words, WORLD_SIZE=str(ranks))
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


TRAIN = {  # on CPU ranks, too: script, and the least and the most bytes of optimizer states a parameter
    "bf16_states": (ZERO2, 6, 6),
    "fp32_accumulation": (ZERO2, 12, 12),
    "muon": (ZERO2, 8, 12),  # matrices have one moment
    "torch_autocast": (ZERO2, 12, 12),
    "zenflow": (OFFLOAD, None, None),  # keeps them where the scripts do not look
    "zeropp_hpz": (ZERO3, 12, 12),
}
FEW_CORES = {
    "muon": "DeepSpeed compiles Muon's step, which takes minutes on few cores",
    "zenflow": "ZenFlow's own process takes cores for itself, so that a step can take minutes on few cores",
}
NO_CPU = "ops/op_builder/cpu/no_impl.py", "had not been implemented on CPU backend"
GPU_ONLY = {  # and the file of deepspeed's whose words say so
    "deepcompile": ("ops/csrc/includes/deepcompile.h", "#include <ATen/cuda/"),
    "fp16_loss_scaling": ("runtime/engine.py", "Type fp16 is not supported on your device."),
    "superoffload": ("runtime/superoffload/superoffload_stage3.py", "SuperOffload only supports NVIDIA CUDA GPUs"),
    "zeropp_quantized_gradients": NO_CPU,
    "zeropp_quantized_weights": NO_CPU,
}


@pytest.mark.parametrize("name", TRAIN)
def test_a_variant_trains_on_cpu_ranks(name, tmp_path):
    script, least, most = TRAIN[name]
    if name in FEW_CORES and not PATIENT:
        pytest.skip(f"{FEW_CORES[name]}: set PATIENT=1 to wait for it")
    flags = ["--ds_config", VARIANTS / f"{name}.json", "--batch_size", 4, "--log_interval", 1, "--lr", "3e-3"]
    flags += ["--max_steps", 20, "--warmup_steps", 1]
    done = run_script(script, *SHAPE, *flags, "--output_dir", tmp_path / "run", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    found = losses(tmp_path / "run")
    assert found[20] < found[1] - 0.1
    ledger = json.loads((tmp_path / "run" / "summary.json").read_text())["ledger"]
    if least:
        parameters = json.loads((tmp_path / "run" / "args.json").read_text())["n_params"]
        held = 2 * ledger["optimizer_states on cpu"]["held"] / parameters
        assert 0.98 * least <= held <= 1.02 * most


@pytest.mark.parametrize("name", GPU_ONLY)
def test_what_a_variant_needs_a_gpu_for(name):
    import deepspeed

    file, words = GPU_ONLY[name]
    assert words in (Path(deepspeed.__file__).parent / file).read_text()


@pytest.mark.parametrize("path", [*VARIANTS.glob("*.json"), *VARIANTS.with_name("monitoring").glob("*.json")], ids=str)
def test_the_scripts_own_check_takes_every_json(path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lint_config.py", str(path), "--world_size", "2"])
    assert lint_config.main() == 0, capsys.readouterr().out


def test_every_variant_is_tried():
    assert {path.stem for path in VARIANTS.glob("*.json")} == TRAIN.keys() | GPU_ONLY.keys()
