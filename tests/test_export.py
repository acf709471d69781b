"""scripts/export_hf.py and generate.py: any stage's model or checkpoint as a GPT-2 of transformers, and its text."""

import io
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import yaml
from conftest import BASE, ROOT, Run, load_script

HOST = socket.gethostname()
WORDS = ["Ġthe", "Ġvalue", "Ġof", "Ġa", "Ġfunction"]
MATCHING = re.compile(r"exported (.+) to (.+); reloaded, its logits differ by (\S+) at most; "
                      r"its validation loss is (\d+\.\d{6}), the run's (\d+\.\d{6})\n")  # fmt: skip


def run_tool(name: str, *words: object, given: bytes | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / name, *map(str, words)]
    result = subprocess.run(command, capture_output=True, input=given, timeout=120)
    result.stdout, result.stderr = result.stdout.decode(), result.stderr.decode()
    return result


@pytest.fixture(scope="module")
def tool():
    return load_script("export_hf.py")


# A model without a run.
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
def exported(trained, tool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "gpt2"
    tool.export(trained[0], folder)
    return folder


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


def test_a_model_alone_is_exported_and_said_not_to_be_compared(tool, trained, exported, tmp_path, capsys):
    tool.export(trained[0] / "model", tmp_path / "gpt2")
    assert capsys.readouterr().out.endswith(
        "; its validation loss was NOT compared with the run's: there is no args.json or no checkpoint beside it that "
        "names the run's data\n"
    )
    card = (tmp_path / "gpt2" / "README.md").read_text()
    assert "Not evaluated: the run's records or data were not at hand." in card
    assert "| data | not recorded |" in card and "| optimizer steps | not recorded |" in card
    assert "| vocabulary | 261 tokens, in an embedding of 320 rows |" in card
    weights = safetensors.torch.load_file(exported / "model.safetensors").values()
    assert f"| parameters | {sum(weight.numel() for weight in weights):,}, in float32 |" in card


def test_to_gpt2_maps_every_weight_and_refuses_others(tool, trained):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=320, n_positions=32, n_embd=64, n_layer=3, n_head=4)
    wanted = {name: tensor.shape for name, tensor in GPT2LMHeadModel(config).state_dict().items()}
    for weights in (trained[1].state_dict(), dict(trained[1].named_parameters())):  # with the tied head's name, without
        assert {name: tensor.shape for name, tensor in tool.to_gpt2(weights).items()} == wanted
    with pytest.raises(ValueError, match=r"^blocks.0.attention.bias is no weight of a GPTLike$"):
        tool.to_gpt2({"blocks.0.attention.bias": torch.zeros(1)})


def test_wrong_weights_are_noticed_and_the_old_export_stays(tool, trained, tmp_path, monkeypatch):
    tool.export(trained[0], tmp_path / "gpt2")
    before = {path.name: path.read_bytes() for path in (tmp_path / "gpt2").iterdir()}
    right = tool.to_gpt2

    def wrong(weights: dict) -> dict:
        renamed = right(weights)
        return renamed | {"transformer.h.1.ln_1.bias": renamed["transformer.h.1.ln_2.bias"]}

    monkeypatch.setattr(tool, "to_gpt2", wrong)
    with pytest.raises(ValueError, match="is wrong: its logits differ from the model's by "):
        tool.export(trained[0], tmp_path / "gpt2")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "gpt2").iterdir()}


# Real runs.
def shared_run(train, config: str | None, precision: str) -> Run:
    """One that other tests train as well."""
    ranks = {"ranks": 2, "batch_size": 4} if config else {"batch_size": 8}
    return train(config, precision=precision, dropout=0, **ranks)


@pytest.fixture
def copy(train, tmp_path):
    """A function that copies a run, to be damaged."""

    def copy(config: str | None, precision: str = "fp32") -> Path:
        return shutil.copytree(shared_run(train, config, precision).folder, tmp_path / f"run-{config}")

    return copy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "precision"),
    [
        *((config, "fp32") for config in (None, "zero1", "zero2", "zero3")),
        *(pytest.param(c, "fp32", marks=pytest.mark.drill) for c in ("zero_offload", "zero3_offload", "multihosts")),
        *(pytest.param(c, "bf16", marks=pytest.mark.drill) for c in ("zero1", "zero3")),
    ],
)
def test_any_stage_and_any_checkpoint(tool, train, tmp_path, capsys, config, precision):
    """The last checkpoint's weights are model/'s to the last bit, and both have the run's validation loss."""
    run, weights = shared_run(train, config, precision), []
    for source in (run.folder, run.folder / "checkpoints" / "step20"):
        tool.export(source, tmp_path / "gpt2")
        _, _, logits, found, wanted = MATCHING.fullmatch(capsys.readouterr().out).groups()
        assert float(logits) < 1e-5
        assert wanted == f"{run.json('summary')['validation_loss']:.6f}"
        assert float(found) == pytest.approx(float(wanted), abs=1e-5 if precision == "fp32" else 1e-4)
        weights.append(safetensors.torch.load_file(tmp_path / "gpt2" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert {weight.dtype for weight in weights[0].values()} == {tool.DTYPES[precision]}


@pytest.mark.slow
def test_the_card_says_what_the_run_recorded(tool, train, tmp_path):
    from transformers import GenerationConfig

    run = shared_run(train, "zero2", "fp32")
    tool.export(run.folder, tmp_path / "gpt2")
    _, head, card = (tmp_path / "gpt2" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {"language": "en", "library_name": "transformers", "tags": ["gpt2"],
                                    "pipeline_tag": "text-generation"}  # fmt: skip
    summary = run.json("summary")
    for row in (
        "| data | the language reference that comes with Python (`pydoc_data.topics`), split by topic |",
        f"| tokens seen in training | {20 * 2 * 4 * 32:,} |", "| shape | 2 layers, 4 heads, width 64, 32 positions |",
        f"| parameters | {summary['parameters']:,}, in float32 |", "| optimizer steps | 20 |", "| ranks | 2 |",
        "| sequences in a step | 8 |", "| `--lr` | 0.0006 |", "| `--precision` | fp32 |", "| ZeRO stage | 2 |",
    ):  # fmt: skip
        assert f"{row}\n" in card
    shown = [float(cell) for cell in re.search(r"^\| validation \| (.+) \|$", card, re.MULTILINE)[1].split(" | ")]
    kinds = ("loss", "perplexity", "word_perplexity", "bits_per_byte")
    assert shown == pytest.approx([summary[f"validation_{kind}"] for kind in kinds], rel=2e-5)
    assert "not recorded" not in card and str(run.folder) not in card
    assert GenerationConfig.from_pretrained(tmp_path / "gpt2").suppress_tokens is None  # 1,024 tokens fill their rows


@pytest.mark.slow
def test_a_folder_of_texts_is_named_but_not_where_it_lies(tool, copy, tmp_path, monkeypatch, capsys):
    """And data that cannot be had, or are others now, are said not to have been compared."""
    folder = copy(None)
    monkeypatch.setenv("GPTLIKE_CACHE", str(tmp_path / "cache"))  # the run's tokens are not in this one
    args = json.loads((folder / "args.json").read_text()) | {"dataset": str(tmp_path / "private" / "letters")}
    (folder / "args.json").write_text(json.dumps(args))
    tool.export(folder, tmp_path / "gpt2")
    assert f"NOT compared with the run's: --dataset {args['dataset']}: no such folder" in capsys.readouterr().out
    card = (tmp_path / "gpt2" / "README.md").read_text()
    tool.export(folder, tmp_path / "gpt2", evaluated=False)
    assert capsys.readouterr().out.endswith("was NOT compared with the run's, as --skip_evaluation wants\n")
    assert "the texts of a folder named `letters`" in card and "private" not in card
    assert "Validation: measured on the training run." in card
    Path(args["dataset"]).mkdir(parents=True)
    for name in ("train.txt", "valid.txt"):
        Path(args["dataset"], name).write_text("Some other text, and more of it than fits into one block.\n" * 30)
    tool.export(folder, tmp_path / "gpt2")
    assert f"--dataset {args['dataset']} with --tokenizer bpe:1024 is not here what it" in capsys.readouterr().out
    shutil.rmtree(folder / "model")  # a checkpoint then has no tokenizer
    with pytest.raises(ValueError, match=r"step20 comes without its tokenizer: there is no .*tokenizer.json, and "):
        tool.export(folder / "checkpoints" / "step20", tmp_path / "gpt2")


@pytest.mark.slow
def test_a_loss_that_is_not_the_runs_stops_the_export(tool, copy, tmp_path):
    folder = copy(None)
    summary = json.loads((folder / "summary.json").read_text())
    for change, fits in ((9e-5, True), (-1.2e-4, False)):
        changed = summary | {"validation_loss": summary["validation_loss"] + change}
        (folder / "summary.json").write_text(json.dumps(changed))
        if fits:
            tool.export(folder, tmp_path / "fits")
        else:
            loss = str(summary["validation_loss"])[:4]
            message = f"^the export is wrong: its validation loss is {loss}.*, the run's {loss}"
            with pytest.raises(ValueError, match=message):
                tool.export(folder, tmp_path / "wrong")
    assert list((tmp_path / "wrong").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_missing_shards_are_named_by_host_and_file(tool, copy, tmp_path, config):
    """As on the first of two hosts with disks of their own, whose manifest lists its own rank's files."""
    step = copy(config) / "checkpoints" / "step20"
    manifest = json.loads((step / "run.json").read_text())
    manifest["files"] = {name: size for name, size in manifest["files"].items() if "rank_1_" not in name}
    assert manifest["hosts"] == [HOST, HOST]
    manifest["hosts"][1] = "node1"
    (step / "run.json").write_text(json.dumps(manifest))
    for path in step.glob("*zero_pp_rank_1_*"):
        path.unlink()
    lost = ["zero_pp_rank_1_mp_rank_00_optim_states.pt"]
    lost += ["zero_pp_rank_1_mp_rank_00_model_states.pt"] if config == "zero3" else []
    with pytest.raises(ValueError, match="lacks") as error:
        tool.export(step, tmp_path / "gpt2")
    assert str(error.value) == (
        f"{step} on host {HOST} lacks {', '.join(f'{name} of rank 1, written on host node1' for name in lost)}: copy "
        "them here from this folder there"
    )
    assert not (tmp_path / "gpt2").exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "listed but gone", "no pickle", "no manifest", "nvme", "other shape"])
def test_damaged_shards_are_named(tool, copy, tmp_path, damage):
    folder = copy("zero2")
    step = folder / "checkpoints" / "step20"
    shard, manifest = step / "zero_pp_rank_1_mp_rank_00_optim_states.pt", json.loads((step / "run.json").read_text())
    whole = f"{step} on host {HOST} is not a whole checkpoint: "
    size = shard.stat().st_size
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:1000])
        message = f"{whole}{shard.name} has 1000 bytes instead of {size}"
    elif damage == "listed but gone":
        shard.unlink()
        message = f"{whole}[Errno 2] No such file or directory: '{shard}'"
    elif damage == "no pickle":
        shard.write_bytes(bytes(size))
        message = f"cannot read {step}: "
    elif damage == "no manifest":
        (step / "run.json").unlink()
        message = f"{whole}[Errno 2] No such file or directory: '{step / 'run.json'}'"
    elif damage == "nvme":
        config = {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}
        (folder / "ds_config.json").write_text(json.dumps(config))
        message = f"the weights of {step} lie on NVMe and not in its files: export {folder}"
    else:
        manifest["settings"]["n_layer"] = 3
        (step / "run.json").write_text(json.dumps(manifest))
        message = f"{step} is not what its run.json says: n_layer is 3, but 2 by the model's other files"
    with pytest.raises(ValueError, match=re.escape(message)):
        tool.export(step, tmp_path / "gpt2")
    assert not (tmp_path / "gpt2").exists()


class Intruder:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.slow
def test_a_checkpoint_of_base_runs_no_code(tool, copy, tmp_path):
    step, mark = copy(None) / "checkpoints" / "step20", tmp_path / "intruded"
    torch.save({"model": Intruder(mark)}, step / "state.pt")
    manifest = json.loads((step / "run.json").read_text())
    manifest["files"]["state.pt"] = (step / "state.pt").stat().st_size
    (step / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"^cannot read {step}/state.pt: Weights only load failed"):
        tool.export(step, tmp_path / "gpt2")
    assert not mark.exists() and not (tmp_path / "gpt2").exists()
    pickle.load(io.BytesIO(pickle.dumps(Intruder(mark))))  # noqa: S301  what it would have done
    assert mark.exists()


# Bad input.
@pytest.mark.parametrize(
    "damage",
    ["no model", "onto itself", "no number of layers", "half a file", "other shapes", "bad args", "bad summary"],
)
def test_export_refuses(tool, trained, tmp_path, damage):
    model, target = tmp_path / "model", tmp_path / "gpt2"
    shutil.copytree(trained[0] / "model", model)
    config, weights = model / "config.json", model / "model.safetensors"
    if damage == "no model":
        config.unlink()
        message = "model lacks config.json: give the --output_dir of a finished run, its model/, or a checkpoint such "
    elif damage == "onto itself":
        target, message = model, "model is the model itself: choose another OUT_DIR"
    elif damage == "no number of layers":
        config.write_text("{}")
        message = "cannot read .*config.json: no block_size, d_model, n_head, n_layer, padded_vocab_size, vocab_size"
    elif damage == "half a file":
        weights.write_bytes(weights.read_bytes()[:1000])
        message = "cannot read .*model.safetensors: "
    elif damage == "other shapes":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"n_layer": 4}))
        message = "cannot read .*config.json: n_layer is 4, but 3 by the model's other files"
    elif damage == "bad args":
        (tmp_path / "args.json").write_text('{"dataset": 3, "tokenizer": "gpt2"}')
        message = r"cannot read .*args.json: ValueError\('dataset is 3'\). Is it of a training run\?"
    else:
        (tmp_path / "summary.json").write_text('{"steps": 1')
        message = "cannot read .*summary.json: JSONDecodeError"
    with pytest.raises(ValueError, match=message):
        tool.export(tmp_path, target)
    assert not (tmp_path / "gpt2").exists()


# Text.
@pytest.fixture
def sample(exported, monkeypatch):
    """A function from flags of generate.py to its text and its tokens."""
    from transformers import GPT2LMHeadModel

    generate, made, plain = load_script("generate.py"), [], GPT2LMHeadModel.generate
    monkeypatch.setattr(GPT2LMHeadModel, "generate", lambda *a, **k: made.append(plain(*a, **k)) or made[-1])
    loaded = generate.load(exported)

    def sample(*, stream: bool = False, **flags: object) -> tuple[str, list[int]]:
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        args = generate.build_parser().parse_args([str(exported), *words])
        text = generate.generate(*loaded, args.prompt, args, stream=stream)
        return text, made[-1][0].tolist()

    return sample


def test_the_same_seed_gives_the_same_text(sample):
    flags = {"prompt": "of the value", "max_new_tokens": 15, "temperature": 2, "top_k": 0}
    text, tokens = sample(**flags, seed=1)
    assert text.startswith("of the value") and len(tokens) == 12 + 15  # a token a byte
    assert sample(**flags, seed=1) == (text, tokens)
    assert sample(**flags, seed=2) != (text, tokens)


def test_temperature_0_or_one_choice_takes_the_likeliest(sample):
    flags = {"prompt": "of", "max_new_tokens": 10}
    greedy = sample(**flags, temperature=0, seed=1)
    assert greedy == sample(**flags, temperature=0, seed=2)
    assert greedy == sample(**flags, temperature=1, top_k=1) == sample(**flags, temperature=1, top_p=1e-6)


def test_padding_is_never_sampled(sample, exported):
    """At so high a temperature every row is as likely as another: a fifth of all would be padding, 261 to 319."""
    _, tokens = sample(prompt="of", max_new_tokens=30, temperature=1000, top_k=0)
    assert len(tokens) == 32 and max(tokens) < 261
    config = json.loads((exported / "generation_config.json").read_text())
    assert config["suppress_tokens"] == list(range(261, 320))  # for everyone else's generate()


def test_the_text_streams_as_it_comes(sample, monkeypatch):
    flags, written = {"prompt": "of the value", "max_new_tokens": 15, "top_k": 0}, []
    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=written.append, flush=lambda: None))
    text, _ = sample(**flags, stream=True)
    assert "".join(written) == f"{text}\n"
    assert len([piece for piece in written if piece.strip()]) > 1


@pytest.mark.slow
def test_a_prompt_a_line_of_standard_input(exported):
    """Each gets the text that it has alone; a line that is wrong ends it, after the texts before it."""
    flags = [exported, "--max_new_tokens", 12, "--temperature", 0]
    alone = [run_tool("generate.py", *flags, "--prompt", prompt).stdout for prompt in ("of the value", "a naïve")]
    given = "of the value\n\n  \na naïve\r\n".encode()
    result = run_tool("generate.py", *flags, given=given)
    assert (result.returncode, result.stdout, result.stderr) == (0, "\n".join(alone), "")
    assert alone[0].startswith("of the value") and alone[1].startswith("a naïve")
    result = run_tool("generate.py", *flags, given=b"of the value\n\n" + b"of " * 40)
    assert (result.returncode, result.stdout.strip()) == (1, alone[0].strip())
    assert result.stderr == ("generate.py: error: standard input, line 3: --max_new_tokens 12: of the model's 32 "
                             "positions this prompt leaves 0\n")  # fmt: skip


@pytest.mark.parametrize(
    ("words", "given", "code", "message"),
    [
        (["RUN", "--prompt", "of"], b"", 1, "RUN is no exported model: run scripts/export_hf.py RUN_DIR RUN first"),
        (
            ["EXPORTED", "--prompt", "of", "--max_new_tokens", "31"], b"", 1,
            "--max_new_tokens 31: of the model's 32 positions this prompt leaves 30",
        ),
        (["EXPORTED"], b"\n \n", 1, "standard input has no prompt in its 2 lines: write one a line, or --prompt"),
        (["EXPORTED"], b"", 1, "standard input has no prompt in its 0 lines: write one a line, or --prompt"),
        (["EXPORTED"], b"caf\xe9\n", 1, "standard input, line 1 is not UTF-8: 'utf-8' codec can't decode byte 0xe9 in "
                                        "position 3: invalid continuation byte"),
        (["EXPORTED", "--prompt", ""], b"", 2, "--prompt is empty: write at least a word"),
        (["EXPORTED", "--prompt", "of", "--temperature", "-1"], b"", 2, "--temperature -1.0: must be at least 0"),
        (["EXPORTED", "--prompt", "of", "--top_p", "0"], b"", 2, "--top_p 0.0: must be above 0 and at most 1"),
        (["EXPORTED", "--prompt", "of", "--top_p", "nan"], b"", 2, "--top_p nan: must be above 0 and at most 1"),
        (["EXPORTED", "--pro", "of"], b"", 2, "unrecognized arguments: --pro of"),
    ],
)  # fmt: skip
def test_generate_refuses(trained, exported, words, given, code, message, monkeypatch, capsys):
    folders = {"RUN": str(trained[0]), "EXPORTED": str(exported)}
    monkeypatch.setattr("sys.argv", ["generate.py", *[folders.get(word, word) for word in words]])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
    with pytest.raises(SystemExit) as stop:
        load_script("generate.py").main()
    printed = capsys.readouterr()
    said = stop.value.code if code == 1 else printed.err.splitlines()[-1]  # Python prints a text, with exit code 1
    assert (code == 1 or stop.value.code == code) and printed.out == ""
    message = re.sub(r"\bRUN\b", folders["RUN"], message)
    assert said == f"generate.py: error: {message}"


def test_a_terminal_has_to_give_a_prompt(exported, monkeypatch, capsys):
    generate = load_script("generate.py")
    monkeypatch.setattr("sys.argv", ["generate.py", str(exported)])
    for stdin in (SimpleNamespace(isatty=lambda: True), None):  # None: closed, as under some job managers
        monkeypatch.setattr("sys.stdin", stdin)
        with pytest.raises(SystemExit) as stop:
            generate.main()
        assert stop.value.code == 2
        assert "the following arguments are required: --prompt, or prompts on standard" in capsys.readouterr().err
