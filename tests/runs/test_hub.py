"""The default data and tokenizer come from the Hub, served here on loopback; without it one message helps."""

import pytest
from conftest import BASE, command, losses, run
from hub_server import HANG, HubServer, wikitext_repo

pytestmark = pytest.mark.slow
ROWS = {"train": ["", "= Robert Boulter =", "", *(f"Sentence number {i} of an article ." for i in range(200))]}
ROWS |= {"validation": ROWS["train"][:60], "test": ROWS["train"][:40]}
FLAGS = (
    "--n_layer 1 --n_head 2 --d_model 32 --block_size 16 --batch_size 2 --max_steps 2 --precision fp32 --log_interval 1"
)


def tokenizer_repo() -> dict[str, bytes]:
    """A byte-level tokenizer.json in the place of GPT-2's."""
    import tokenizers

    trainer = tokenizers.ByteLevelBPETokenizer()
    trainer.train_from_iterator(ROWS["train"], 400, min_frequency=0, show_progress=False)
    config = b'{"model_type": "gpt2"}'
    return {
        "tokenizer.json": trainer.to_str().encode(),
        "config.json": config,
        "tokenizer_config.json": b'{"tokenizer_class": "GPT2TokenizerFast"}',
    }


def test_default_data_from_the_hub_and_then_from_its_cache(tmp_path):
    words = command(BASE, *FLAGS.split(), "--output_dir", tmp_path / "run")
    repos = {
        "datasets": {"Salesforce/wikitext": wikitext_repo(ROWS)},
        "models": {"openai-community/gpt2": tokenizer_repo()},
    }
    with HubServer(**repos) as hub:
        variables = hub.env(tmp_path / "hf", HF_HUB_OFFLINE="0")
        result = run(words, **variables)
        assert result.returncode == 0, result.stderr
        assert hub.asked("train-00000-of-00001.parquet")
    assert len(losses(tmp_path / "run")) == 2 and "wikitext2: tokens train " in result.stdout
    again = run([*words, "--overwrite"], **variables)  # the server is gone, the cache is there
    assert again.returncode == 0, again.stderr
    tokens = [line for line in result.stdout.splitlines() if line.startswith("wikitext2: tokens")]
    assert tokens == [line for line in again.stdout.splitlines() if line.startswith("wikitext2: tokens")]


@pytest.mark.parametrize("failure", [HANG, pytest.param(500, marks=pytest.mark.drill)])
def test_out_of_reach(failure, tmp_path):
    with HubServer(fail={".": failure}) as hub:
        words = command(BASE, *FLAGS.split(), "--output_dir", tmp_path / "run")
        result = run(words, **hub.env(tmp_path / "hf", HF_HUB_OFFLINE="0"))
    assert result.returncode == 1 and "the Hugging Face Hub does not answer (" in result.stdout
    for way_out in ("HF_ENDPOINT=", "HF_HUB_OFFLINE=1", "--dataset DIR", "--dataset sample"):
        assert way_out in result.stderr
    assert "Traceback" not in result.stderr
    assert len(hub.requests) == 1  # no retries, which would take minutes
