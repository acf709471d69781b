"""scripts/tools/export_hf.py on a made-up run: the same model for transformers, or one message and no folder.

And scripts/tools/generate.py on what it has exported.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "tools"))
import common
import export_hf
import generate

SENTENCE = "The tower is 1,063 feet (324 m) tall,\n\n  as high as an 81 @-@ storey building – naïve café.\n"
WORDS = ["Ġthe", "Ġvalue", "Ġof", "Ġa", "Ġfunction"]
SHAPE = {"n_layer": 2, "n_head": 4, "d_model": 64, "block_size": 32}
ARGS = {"tokenizer": "bpe:300", "precision": "fp32", "batch_size": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training script leaves: random weights, a tokenizer of 261 tokens, the loss on a validation split."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    base, folder = common.load_script("GPTLike-Base.py"), tmp_path_factory.mktemp("run")
    bytewise = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate(sorted(bytewise.alphabet()))}, [])
    )
    tokenizer.add_tokens(WORDS)
    tokenizer.pre_tokenizer, tokenizer.decoder = bytewise(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    torch.manual_seed(0)
    model = base.GPTLike(argparse.Namespace(**SHAPE, dropout=0.1, activation_checkpointing=False, seed=42), 261)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms, too: a swap of two must show
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    (folder / "text").mkdir()
    for split in ("train", "valid"):
        (folder / "text" / f"{split}.txt").write_text("the value of a function\n" * 20)
    (folder / "model").mkdir()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    safetensors.torch.save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps(SHAPE | {"vocab_size": 261}))
    args = ARGS | SHAPE | {"dataset": str(folder / "text")}
    (folder / "args.json").write_text(json.dumps(args))

    place = {"tokenizer": str(folder / "model"), "rank": 0, "world_size": 1, "device": "cpu"}
    args = argparse.Namespace(**args | place)
    loss = base.evaluate(model, base.load_corpus(args), args)["validation_loss"]
    lines = [{"step": 5, "validation_loss": loss + 1}, {"step": 9, "validation_loss": loss}]  # model/ is the best's
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def call(tool: object, *words: object) -> int | str:
    """The tool's main(): 0, or what it hands to sys.exit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"{tool.__name__}.py", *map(str, words)])
        try:
            tool.main()
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    assert call(export_hf, run, folder) == 0
    return folder


def our_logits(run: Path, tokens: torch.Tensor) -> torch.Tensor:
    args = argparse.Namespace(**SHAPE, dropout=0.0, activation_checkpointing=False, seed=42)
    model = common.load_script("GPTLike-Base.py").GPTLike(args, 261).eval()
    weights = safetensors.torch.load_file(run / "model" / "model.safetensors")
    model.load_state_dict(weights | {"head.weight": weights["token_embedding.weight"]})
    with torch.no_grad():
        return model(tokens)


def test_an_export_is_the_same_model_for_transformers(run, exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gpt2 = AutoModelForCausalLM.from_pretrained(exported).eval()
    assert (type(gpt2).__name__, gpt2.config.vocab_size, gpt2.dtype) == ("GPT2LMHeadModel", 320, torch.float32)
    assert gpt2.generation_config.suppress_tokens == list(range(261, 320))  # the padding rows
    tokens = torch.randint(261, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (gpt2(tokens).logits - our_logits(run, tokens)).abs().max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(exported)
    tokens = tokenizer(SENTENCE)["input_ids"]
    assert len(tokens) == len(SENTENCE.encode()) and max(tokens) < 256  # a token a byte
    assert tokenizer.decode(tokens) == SENTENCE
    assert not list(exported.glob(".export*"))


@pytest.mark.parametrize(("flags", "dtype"), [([], torch.float32), (["--dtype", "bf16"], torch.bfloat16)])
def test_it_prints_both_losses(run, tmp_path, capsys, flags, dtype):
    assert call(export_hf, run / "model", tmp_path, *flags) == 0
    wanted = common.read_metrics(run)[9]["validation_loss"]
    printed = capsys.readouterr().out
    assert printed.startswith(f"exported {run}/model to {tmp_path}; reloaded, its logits differ by ")
    assert printed.endswith(f", the run's {wanted:.6f}\n")
    assert {t.dtype for t in safetensors.torch.load_file(tmp_path / "model.safetensors").values()} == {dtype}


def test_without_the_data_it_says_that_the_loss_was_not_compared(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "args.json").write_text(json.dumps(ARGS | SHAPE | {"dataset": "gone"}))
    assert call(export_hf, tmp_path / "run", tmp_path / "a") == 0
    assert "its validation loss was NOT compared with the run's: cannot take --dataset gone " in capsys.readouterr().out
    assert call(export_hf, run, tmp_path / "b", "--skip_evaluation") == 0
    assert "its validation loss was NOT compared with the run's: --skip_evaluation" in capsys.readouterr().out


def test_a_wrong_key_map_does_not_pass(run, tmp_path, monkeypatch):
    monkeypatch.setitem(export_hf.NAMES, "norm1", "ln_2")
    monkeypatch.setitem(export_hf.NAMES, "norm2", "ln_1")
    message = call(export_hf, run, tmp_path / "out")
    assert message.startswith("export_hf.py: error: the export is wrong: its logits differ from the model's by ")
    assert not any((tmp_path / "out").iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def wipe(path: Path) -> None:
    """Zeros over the last quarter: the file still loads."""
    content = path.read_bytes()
    path.write_bytes(content[: -len(content) // 4] + bytes(len(content) // 4))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {  # what is done to the run, and the message
    "weights overwritten": (lambda run: wipe(run / "model/model.safetensors"), "its validation loss is "),
    "half a file": (lambda run: cut(run / "model/model.safetensors"), "cannot read RUN/model/model.safetensors: "),
    "no model": (lambda run: shutil.rmtree(run / "model"), "cannot read RUN/model/config.json: [Errno 2]"),
    "more layers": (lambda run: edit(run / "model/config.json", n_layer=4), "do not fit GPTLike-Base.py's GPTLike"),
    "no number": (lambda run: edit(run / "model/config.json", n_head="4"), "RUN/model/config.json has no n_head"),
    "half of the config": (lambda run: (run / "model/config.json").write_text('{"n'), "cannot read RUN/model/config"),
    "half a tokenizer": (lambda run: cut(run / "model/tokenizer.json"), "cannot read RUN/model/tokenizer.json: "),
    "args of another": (lambda run: edit(run / "args.json", precision=3), "args.json of the run is not what a"),
    "half of the metrics": (lambda run: (run / "metrics.jsonl").write_text("{\n"), "RUN/metrics.jsonl, line 1 is not"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_run_is_one_message_and_no_export(run, tmp_path, case):
    damage, message = DAMAGE[case]
    damaged = Path(shutil.copytree(run, tmp_path / "run"))
    damage(damaged)
    said = call(export_hf, damaged, tmp_path / "out")
    assert said.startswith("export_hf.py: error: ") and message.replace("RUN", str(damaged)) in said
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_it_writes_over_an_export_but_over_nothing_else(run, exported, tmp_path):
    assert call(export_hf, run, exported, "--skip_evaluation") == 0
    assert f"{run} is something else than an export: choose another OUT" in call(export_hf, run, run)
    (run / "checkpoints" / "step3").mkdir(parents=True)
    said = call(export_hf, run / "checkpoints" / "step3", tmp_path / "out")
    assert f"step3 has no rank<R>.json, so it is no whole checkpoint of a ZeRO script: export {run}" in said


# Text.
def test_the_same_seed_gives_the_same_text_and_never_padding(exported, capsys):
    texts = []
    for seed in (1, 1, 2):
        flags = "--max_new_tokens", 15, "--temperature", 1000, "--top_k", 0, "--seed", seed
        assert call(generate, exported, "--prompt", "of the value", *flags) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("of the value") and len(texts[0]) > len("of the value\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["RUN", "--prompt", "of"], "RUN is no exported model: run scripts/tools/export_hf.py RUN RUN first"),
        (["OUT", "--prompt", "of", "--max_new_tokens", "31"], "of 32 positions 'of' leaves 30"),
        (["OUT"], 2),
        (["OUT", "--prompt", ""], 2),
        (["OUT", "--prompt", "of", "--temperature", "-1"], 2),
        (["OUT", "--prompt", "of", "--temperature", "nan"], 2),
        (["OUT", "--pro", "of"], 2),
    ],
)
def test_generate_refuses(run, exported, words, said):
    folders = {"RUN": run, "OUT": exported}
    found = call(generate, *[folders.get(word, word) for word in words])
    if said == 2:
        assert found == 2
    else:
        message = said.replace("RUN is", f"{run} is").replace("RUN first", f"{run} first")
        assert found.startswith("generate.py: error: ") and message in found
