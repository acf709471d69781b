"""This GPT with experts: every second block has several feed-forwards, and each token takes one of them.

More parameters for the same arithmetic. A gate, one small matrix, chooses the expert of a token. Experts are divided
among ranks (expert parallelism): a rank sends each token to the rank of its expert and gets it back, two all-to-all a
layer and pass, of --capacity x batch x seq x d_model elements. All else is data parallel. All experts start as the
dense feed-forward; the gate multiplies what they give by its probability of the choice.
The gate is to use all experts alike: a loss for that, times --balance, is added. An expert takes at most --capacity
times its even share of the tokens, the others skip the layer; with --capacity 0 none does. tokens_per_expert shows
what the gate chose.
DeepSpeed's MoE layer trains at ZeRO stages 0, 1 and 2. For stage 3 DeepSpeed has AutoEP, which divides the experts of
transformers' models.

Run:
    torchrun --nproc_per_node 2 examples/mixture_of_experts.py --dataset sample --n_layer 2 --d_model 96 --max_steps 10

Source: DeepSpeed-MoE, arXiv:2201.05596; Switch Transformer, arXiv:2101.03961; https://www.deepspeed.ai/tutorials/mixture-of-experts/
"""

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from shared import RANK, RANKS, base, mean_over_ranks, must_divide, prepare, schedule, show_held, start, start_ranks
from torch import nn


class Experts(nn.Module):
    """In the place of a feed-forward. balance_loss and counts (tokens by expert) are of the last call."""

    def __init__(self, feed_forward, args):
        super().__init__()
        self.moe = MoE(
            args.d_model,
            expert=feed_forward,
            num_experts=args.experts,
            ep_size=args.expert_ranks,
            capacity_factor=args.capacity or 1.0,
            drop_tokens=args.capacity > 0,
        )

    def forward(self, x):  # (batch, seq, d_model)
        x, self.balance_loss, self.counts = self.moe(x)
        return x


def parameter_groups(model):
    """As in the scripts; ZeRO keeps experts apart, whose copies lie on fewer ranks."""
    decay, rest = base.parameter_groups(model)
    decay["name"], rest["name"] = "decay", "rest"
    return split_params_into_different_moe_groups_for_optimizer([decay, rest])


def main(args, config):
    must_divide("expert_ranks", args, ranks=RANKS, experts=args.experts)
    if args.n_layer < 2:
        raise base.UserError("every second block has experts: take --n_layer 2 or more")
    start_ranks(args, config, 2, "DeepSpeed's MoE does not train at stage 3")
    model, samples = prepare(args, config)
    torch.manual_seed(args.seed + RANK)  # dropout differs from rank to rank
    for block in model.blocks[1::2]:
        block.feed_forward = Experts(block.feed_forward, args)
    layers = [block.feed_forward for block in model.blocks[1::2]]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameter_groups(model), lr_scheduler=schedule(args), config=config
    )
    for step in range(args.max_steps):
        losses, counts = [], 0
        for inputs, targets in base.micro_batches(samples.data, step, args):
            loss = engine(inputs, targets)
            balance_loss = sum(layer.balance_loss for layer in layers)
            engine.backward(loss + args.balance * balance_loss)
            engine.step()
            losses.append(torch.stack([loss, balance_loss / len(layers)]).detach())
            counts = counts + torch.stack([layer.counts for layer in layers])
        mean_loss, mean_balance = mean_over_ranks(torch.stack(losses).mean(dim=0)).tolist()
        tokens = mean_over_ranks(counts.float().to(engine.device)) * RANKS  # of all ranks
        line = f"step={step + 1} loss={mean_loss:.6f} balance_loss={mean_balance:.4f}"
        base.log(f"{line} tokens_per_expert={tokens.int().tolist()}")
    show_held(f"{args.experts // args.expert_ranks} of {args.experts} experts", engine)


if __name__ == "__main__":
    start(main, __doc__, experts=4, expert_ranks=2, capacity=1.25, balance=0.01)
