"""The model is GPT-2's: against transformers, number by number, and by what it may and may not see."""

import math

import pytest
import torch
from conftest import BASE, load_script, script_args

script = load_script(BASE)
SHAPE = "--n_layer 2 --n_head 4 --d_model 64 --block_size 32 --dropout 0".split()


def model(*words, vocab=1000):
    torch.manual_seed(0)
    return script.GPTLike(script_args(script, *SHAPE, *words), vocab)


def test_a_later_token_changes_no_earlier_logits():
    net, tokens = model(), torch.randint(1000, (2, 32))
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 1000
    difference = (net(tokens) - net(changed)).abs().amax(dim=(0, 2))
    assert difference[:20].max() == 0 and difference[20:].min() > 0


def test_tied_head_and_count():
    net = model()
    assert net.head.weight is net.token_embedding.weight
    assert net.token_embedding.weight.shape == (1024, 64)
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters == 1024 * 64 + 32 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64


def test_initialization_is_gpt2s():
    net = model("--d_model", "256")
    block = net.blocks[0]
    for weight, std in (
        (net.token_embedding.weight, 0.02),
        (block.attention.qkv.weight, 0.02),
        (block.attention.projection.weight, 0.02 / math.sqrt(4)),
        (block.feed_forward[2].weight, 0.02 / math.sqrt(4)),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert all(p.abs().max() == 0 for name, p in net.named_parameters() if name.endswith("bias"))


def test_loss_is_cross_entropy_of_the_targets_that_count():
    net, tokens = model(), torch.randint(1000, (2, 32))
    targets = torch.randint(1000, (2, 32))
    targets[:, 10:] = -100
    logs = torch.log_softmax(net(tokens), -1).gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    assert net(tokens, targets).item() == pytest.approx(-logs[:, :10].mean().item(), rel=1e-6)
    assert net(tokens, targets).dtype == torch.float32
    assert net.bfloat16()(tokens, targets).dtype == torch.float32


def test_logits_equal_those_of_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel

    net, tokens = model(vocab=1024), torch.randint(1024, (2, 32))
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 32, "vocab_size": 1024}
    theirs = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    names = {"qkv": "attn.c_attn", "projection": "attn.c_proj", "0": "mlp.c_fc", "2": "mlp.c_proj"}
    with torch.no_grad():
        theirs.transformer.wte.weight.copy_(net.token_embedding.weight)
        theirs.transformer.wpe.weight.copy_(net.position_embedding.weight)
        for ours, block in zip(net.blocks, theirs.transformer.h, strict=True):
            for name, path in names.items():
                linear = getattr(ours.attention, name, None) or ours.feed_forward[int(name)]
                linear.bias.normal_()
                block.get_submodule(path).weight.copy_(linear.weight.T)
                block.get_submodule(path).bias.copy_(linear.bias)
        assert (net(tokens) - theirs(tokens).logits).abs().max() < 1e-5


def test_activation_checkpointing_changes_no_gradient():
    tokens = torch.randint(1000, (2, 32))
    gradients = []
    for flags in ((), ("--activation_checkpointing",)):
        net = model(*flags)
        net(tokens, tokens).backward()
        gradients.append(net.blocks[0].attention.qkv.weight.grad)
    assert torch.equal(*gradients)


def test_matrices_decay_and_nothing_else():
    net = model()
    decay, rest = script.parameter_groups(net)
    assert rest["weight_decay"] == 0.0 and "weight_decay" not in decay
    assert {p.dim() for p in decay["params"]} == {2} and {p.dim() for p in rest["params"]} == {1}
    assert len(decay["params"]) + len(rest["params"]) == len(list(net.parameters()))


def test_learning_rate():
    args = script_args(script, "--warmup_steps", "10", "--max_steps", "110")
    found = [script.lr_factor(step, args) for step in (0, 4, 9, 10, 60, 110, 200)]
    assert found == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1])
