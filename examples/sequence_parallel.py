"""This GPT under sequence parallelism (DeepSpeed-Ulysses): each rank has a part of every sequence, for long ones.

Norms, feed-forward, head and loss work token by token, so each rank does its own tokens. Attention needs the whole
sequence: an all-to-all changes "all heads of my tokens" into "all tokens of my heads", and another one changes back.
That is four times batch x seq / ranks x d_model elements a block and pass (query, key, value, and what comes out).
Activations shrink by the number of ranks. Weights do not, and ZeRO partitions them as in data parallelism. DeepSpeed
sends gradients in fp32 here, unless "seq_parallel_communication_data_type" says otherwise.

Run:
    torchrun --nproc_per_node 2 examples/sequence_parallel.py --dataset sample --n_layer 2 --d_model 96 --max_steps 10

Source: DeepSpeed-Ulysses, arXiv:2309.14509; https://www.deepspeed.ai/tutorials/ds-sequence/
"""

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.sequence.layer import DistributedAttention
from shared import RANK, RANKS, base, mean_over_ranks, prepare, schedule, show_held, start, start_ranks
from torch import nn


def local_attention(query, key, value):  # each (batch, whole seq, heads of this rank, head_dim)
    heads = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)), is_causal=True)
    return heads.transpose(1, 2)


class UlyssesAttention(nn.Module):
    """In the place of a CausalSelfAttention, with its weights."""

    def __init__(self, attention, group):
        super().__init__()
        self.n_head, self.qkv, self.projection = attention.n_head, attention.qkv, attention.projection
        self.dropout = attention.dropout
        self.attend = DistributedAttention(local_attention, group, scatter_idx=2, gather_idx=1)

    def forward(self, x):  # (batch, seq of this rank, d_model)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).unbind(2)  # (batch, seq, n_head, head_dim)
        heads = self.attend(query, key, value, batch_dim_idx=0)
        return self.dropout(self.projection(heads.flatten(2)))


class LaterPositions(nn.Module):
    """A rank's tokens are not the first of the sequence."""

    def __init__(self, embedding, first):
        super().__init__()
        self.embedding, self.first = embedding, first

    def forward(self, positions):
        return self.embedding(positions + self.first)


def main(args, config):
    if RANKS == 1:
        raise base.UserError("sequence parallelism needs more than one rank: torchrun --nproc_per_node 2 ...")
    if args.n_head % RANKS or args.block_size % RANKS:
        raise base.UserError(f"{RANKS} ranks must divide --n_head {args.n_head} and --block_size {args.block_size}")
    start_ranks(args, config)
    parallel_state_sp.initialize_sequence_parallel(RANKS)  # all ranks share each sequence
    model, samples = prepare(args, config)
    own = args.block_size // RANKS
    for block in model.blocks:
        block.attention = UlyssesAttention(block.attention, parallel_state_sp.get_sequence_parallel_group())
    model.position_embedding = LaterPositions(model.position_embedding, RANK * own)
    # A rank's loss is the mean over its tokens. DeepSpeed adds up the ranks' gradients at stages 0, 1 and 2; at stage 3
    # it averages them. The mean over the sequence is wanted.
    share = 1 if config["zero_optimization"].get("stage") == 3 else 1 / RANKS
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=base.parameter_groups(model),
        lr_scheduler=schedule(args),
        config=config,
        mpu=parallel_state_sp,  # with mesh_param instead, deepspeed 0.19.8 would not add up gradients over the sequence
    )
    args.rank, args.world_size = 0, 1  # all ranks read the same samples
    for step in range(args.max_steps):
        losses = []
        for inputs, targets in base.micro_batches(samples.data, step, args):
            part = slice(RANK * own, (RANK + 1) * own)
            losses.append(engine(inputs[:, part], targets[:, part]))
            engine.backward(losses[-1] * share)
            engine.step()
        loss = mean_over_ranks(torch.stack(losses).mean().detach()).item()
        norm = float(engine.get_global_grad_norm() or "nan")  # None at stage 0
        base.log(f"step={step + 1} loss={loss:.6f} gradient_norm={norm:.6f}")
    show_held(f"{own} of {args.block_size} tokens", engine)


if __name__ == "__main__":
    start(main, __doc__)
