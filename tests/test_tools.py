"""The tools that read what the training scripts write: comparison, export and generation."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import BASE, ROOT, load_script

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def run_tool(name: str, *words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / name, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def write_run(folder: Path, lines: list[dict], *, args: dict | None = None, summary: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, value in (("args", args), ("summary", summary)):
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    steps = [
        {"step": step, "loss": 8 - step / 10, "tokens_per_second": 1000 + step, "peak_memory_gib": 1 + step / 50}
        for step in (10, 20, 30)
    ]
    validations = [
        {"step": 20, "validation_loss": 6.25, "validation_perplexity": 518.0, "validation_bits_per_byte": 2.5},
        {"step": 30, "validation_loss": 6.5, "validation_perplexity": 665.1, "validation_bits_per_byte": 2.6},
    ]
    args = {"max_steps": 30, "zero_stage": 2, "precision": "bf16"}
    summary = {"steps": 30, "parameters": 1234567, "tokens_per_second": 1020.4, "best_validation_loss": 6.25}
    return write_run(tmp_path / "finished", [*steps, *validations], args=args, summary=summary)


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """Killed while it wrote a line, before any validation; without args.json."""
    folder = write_run(tmp_path / "un|finished", [{"step": 10, "loss": 7.5}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    return folder


def cells(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("| \n").split(" | ")] for row in markdown.splitlines()]


def test_compare_shows_every_number(finished, unfinished, tmp_path, monkeypatch, capsys):
    output = tmp_path / "comparison"
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(finished), str(unfinished), "--output", str(output)])
    load_script("compare_runs.py").main()
    table = (output / "compare.md").read_text()
    heading, line, first, second = cells(table)
    assert heading == [
        "run", "ZeRO stage", "precision", "parameters", "steps", "train loss", "validation loss", "best",
        "perplexity per token", "bits per byte", "tokens/s", "peak memory GiB",
    ]
    assert set(line) == {"---"}
    assert first == [
        "finished", "2", "bf16", "1,234,567", "30", "5.0000", "6.5000", "6.2500", "665.1", "2.600", "1,020", "1.60"
    ]
    assert second == ["un\\|finished", "-", "-", "-", "10 of ?, unfinished", "7.5000", *"------"]
    assert (output / "loss.png").read_bytes().startswith(PNG_SIGNATURE)
    assert capsys.readouterr().out.startswith(table)


def test_compare_takes_one_run_and_an_empty_one(finished, tmp_path):
    compare = load_script("compare_runs.py")
    empty = write_run(tmp_path / "empty", [], args={"max_steps": 50, "precision": "fp32", "zero_stage": 3})
    for folder, steps in ((finished, "30"), (empty, "0 of 50, unfinished")):
        runs = compare.read_runs([folder])
        assert cells(compare.table(runs))[2][4] == steps
        compare.plot_losses(runs, tmp_path / "loss.png")
        assert (tmp_path / "loss.png").read_bytes().startswith(PNG_SIGNATURE)


def test_compare_tells_runs_of_one_name_apart(tmp_path):
    folders = [write_run(tmp_path / host / "zero2", [{"step": 1, "loss": 9.0}]) for host in ("a", "b")]
    assert [run.name for run in load_script("compare_runs.py").read_runs(folders)] == [str(f) for f in folders]


def test_compare_plots_more_runs_than_colours_and_losses_that_are_no_numbers(tmp_path):
    compare = load_script("compare_runs.py")
    lines = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": float("nan")}]
    runs = [compare.Run(f"run {number}", lines, {}, {}) for number in range(9)]
    compare.plot_losses(runs, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG_SIGNATURE)


def test_compare_names_all_that_is_wrong(finished, tmp_path):
    broken = write_run(tmp_path / "broken", [{"step": 1, "loss": 9.0}])
    (broken / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 9.0}\n')
    output = tmp_path / "comparison"
    result = run_tool("compare_runs.py", finished, tmp_path / "nothing", broken, "--output", output)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        f"compare_runs.py: error: {tmp_path}/nothing has no metrics.jsonl: give the --output_dir of a training run",
        f'  {broken}/metrics.jsonl, line 2 is no JSON object with a step: {{"loss": 9.0}}',
    ]
    assert not output.exists()
    assert run_tool("compare_runs.py").returncode == 2


WORDS = ["Ġthe", "Ġvalue", "Ġof", "Ġa", "Ġfunction"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A run's folder with model/ as the training scripts write it: random weights, a tokenizer of 261 tokens."""
    import tokenizers

    base, folder = load_script(BASE), tmp_path_factory.mktemp("run")
    bytewise = tokenizers.pre_tokenizers.ByteLevel
    alphabet = sorted(bytewise.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.add_tokens(WORDS)
    tokenizer.pre_tokenizer, tokenizer.decoder = bytewise(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    shape = {"n_layer": 3, "n_head": 4, "d_model": 64, "block_size": 32}
    torch.manual_seed(0)
    args = SimpleNamespace(**shape, dropout=0.1, activation_checkpointing=False)
    model = base.GPTLike(args, tokenizer.get_vocab_size())
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms, too: a swap of two must show
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    (folder / "model").mkdir()
    safetensors.torch.save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})
    (folder / "model" / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    rows = {"vocab_size": 261, "padded_vocab_size": len(model.token_embedding.weight)}
    (folder / "model" / "config.json").write_text(json.dumps(shape | rows))
    return folder, model.eval()


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "gpt2"
    load_script("export_hf.py").export(trained[0], folder)
    return folder


@pytest.mark.slow
def test_export_gives_the_same_logits(trained, exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gpt2 = AutoModelForCausalLM.from_pretrained(exported).eval()
    assert type(gpt2).__name__ == "GPT2LMHeadModel"
    assert (gpt2.config.vocab_size, gpt2.config.n_positions) == (320, 32)
    tokens = torch.randint(261, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (trained[1](tokens) - gpt2(tokens).logits).abs().max() < 1e-4
    tokenizer, text = AutoTokenizer.from_pretrained(exported), "naïve 価値\n\n  of the value"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_to_gpt2_maps_every_weight_and_refuses_others(trained):
    from transformers import GPT2Config, GPT2LMHeadModel

    to_gpt2, model = load_script("export_hf.py").to_gpt2, trained[1]
    config = GPT2Config(vocab_size=320, n_positions=32, n_embd=64, n_layer=3, n_head=4)
    wanted = {name: tensor.shape for name, tensor in GPT2LMHeadModel(config).state_dict().items()}
    for weights in (model.state_dict(), dict(model.named_parameters())):  # with and without the tied head's own name
        assert {name: tensor.shape for name, tensor in to_gpt2(weights).items()} == wanted
    with pytest.raises(ValueError, match=r"^blocks.0.attention.bias is no weight of a GPTLike$"):
        to_gpt2({"blocks.0.attention.bias": torch.zeros(1)})


def test_export_notices_wrong_weights(trained, tmp_path, monkeypatch):
    export = load_script("export_hf.py")
    right = export.to_gpt2

    def wrong(weights: dict) -> dict:
        renamed = right(weights)
        return renamed | {"transformer.h.1.ln_1.bias": renamed["transformer.h.1.ln_2.bias"]}

    monkeypatch.setattr(export, "to_gpt2", wrong)
    with pytest.raises(ValueError, match="is wrong: its logits differ from the model's by "):
        export.export(trained[0], tmp_path / "gpt2")


@pytest.mark.parametrize("damage", ["no model", "onto itself", "no number of layers", "half a file", "other shapes"])
def test_export_refuses(trained, tmp_path, damage):
    export, model, target = load_script("export_hf.py"), tmp_path / "model", tmp_path / "gpt2"
    shutil.copytree(trained[0] / "model", model)
    config, weights = model / "config.json", model / "model.safetensors"
    if damage == "no model":
        config.unlink()
        message = "model lacks config.json: give the --output_dir of a finished run, or its model/"
    elif damage == "onto itself":
        target, message = model, "model is the model itself: choose another OUT_DIR"
    elif damage == "no number of layers":
        config.write_text("{}")
        message = "cannot read .*config.json: no block_size, d_model, n_head, n_layer, padded_vocab_size, vocab_size"
    elif damage == "half a file":
        weights.write_bytes(weights.read_bytes()[:1000])
        message = "cannot read .*model.safetensors: "
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"n_layer": 4}))
        message = "cannot read .*config.json: n_layer is 4, but 3 by the model's other files"
    with pytest.raises(ValueError, match=message):
        export.export(tmp_path, target)
    assert not (tmp_path / "gpt2").exists()


@pytest.fixture
def sample(exported, monkeypatch):
    """A function from flags of generate.py to its text and its tokens."""
    from transformers import GPT2LMHeadModel

    generate, made, plain = load_script("generate.py"), [], GPT2LMHeadModel.generate
    monkeypatch.setattr(GPT2LMHeadModel, "generate", lambda *a, **k: made.append(plain(*a, **k)) or made[-1])

    def sample(**flags: object) -> tuple[str, list[int]]:
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        text = generate.generate(generate.build_parser().parse_args([str(exported), *words]))
        return text, made[-1][0].tolist()

    return sample


def test_generate_gives_the_same_text_for_the_same_seed(sample):
    flags = {"prompt": "of the value", "max_new_tokens": 15, "temperature": 2, "top_k": 0}
    text, tokens = sample(**flags, seed=1)
    assert text.startswith("of the value") and len(tokens) == 12 + 15  # a token a byte
    assert sample(**flags, seed=1) == (text, tokens)
    assert sample(**flags, seed=2) != (text, tokens)


def test_generate_at_temperature_0_or_with_one_choice_takes_the_likeliest(sample):
    flags = {"prompt": "of", "max_new_tokens": 10}
    greedy = sample(**flags, temperature=0, seed=1)
    assert greedy == sample(**flags, temperature=0, seed=2) == sample(**flags, temperature=1, top_k=1)


def test_generate_never_samples_padding(sample, exported):
    """At so high a temperature every row is as likely as another: a fifth of all would be padding, 261 to 319."""
    _, tokens = sample(prompt="of", max_new_tokens=30, temperature=1000, top_k=0)
    assert len(tokens) == 32 and max(tokens) < 261
    config = json.loads((exported / "generation_config.json").read_text())
    assert config["suppress_tokens"] == list(range(261, 320))  # for everyone else's generate()


@pytest.mark.slow
def test_generate_prints_the_text_alone(exported):
    result = run_tool("generate.py", exported, "--prompt", "of the value", "--max_new_tokens", 20)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("of the value")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["RUN", "--prompt", "of"], 1, "RUN is no exported model: run scripts/export_hf.py RUN_DIR RUN first"),
        (
            ["EXPORTED", "--prompt", "of", "--max_new_tokens", "31"],
            1,
            "--max_new_tokens 31: of the model's 32 positions this prompt leaves 30",
        ),
        (["EXPORTED", "--prompt", ""], 2, "--prompt is empty: write at least a word"),
        (["EXPORTED", "--prompt", "of", "--temperature", "-1"], 2, "--temperature -1.0: must be at least 0"),
    ],
)
def test_generate_refuses(trained, exported, words, code, message):
    folders = {"RUN": str(trained[0]), "EXPORTED": str(exported)}
    result = run_tool("generate.py", *[folders.get(word, word) for word in words])
    assert (result.returncode, result.stdout) == (code, "")
    message = re.sub(r"\bRUN\b", folders["RUN"], message)
    assert result.stderr.splitlines()[-1] == f"generate.py: error: {message}"
    assert "Traceback" not in result.stderr
