"""This GPT under tensor parallelism: every matrix of a block is divided, and all ranks work on the same samples.

Of the first matrix of attention and of the feed-forward a rank keeps some rows of the output (heads, hidden units), of
the second one the matching columns of the input. So a block needs two sums over ranks in the forward pass and two in
the backward pass: 4 all-reduces of batch x seq x d_model elements, in the midst of the computing. It wants a fast
link: the GPUs of one host. Embeddings and norms stay whole on every rank.
DeepSpeed's AutoTP cuts the matrices; "partition_config" says which and how. On four ranks, --tensor_ranks 2 gives two
groups with samples of their own, and ZeRO-1 or ZeRO-2 divides states between the groups.

Run:
    torchrun --nproc_per_node 2 examples/tensor_parallel.py --dataset sample --n_layer 2 --d_model 96 --max_steps 10

Source: Megatron-LM, arXiv:1909.08053; https://www.deepspeed.ai/tutorials/autotp-training/
"""

import deepspeed
import torch
from shared import RANKS, base, mean_over_ranks, must_divide, prepare, schedule, show_held, start, start_ranks

PARTITIONS = [
    {"patterns": [r".*attention\.qkv\.weight$"], "partition_type": "column", "shape": [3, -1], "partition_dim": 0},
    {"patterns": [r".*feed_forward\.0\.weight$"], "partition_type": "column"},
    {"patterns": [r".*attention\.projection\.weight$", r".*feed_forward\.2\.weight$"], "partition_type": "row"},
    {"patterns": [r".*head\.weight$"], "partition_type": "skip"},  # tied to the embedding, which stays whole
]


def main(args, config):
    must_divide("tensor_ranks", args, ranks=RANKS, n_head=args.n_head)
    start_ranks(args, config)
    model, samples = prepare(args, config)
    config["tensor_parallel"] = {
        "autotp_size": args.tensor_ranks,
        "partition_config": {"use_default_specs": False, "layer_specs": PARTITIONS},
    }
    for block in model.blocks:
        block.attention.n_head //= args.tensor_ranks  # AutoTP does so itself with num_heads and other names
    # All ranks of a group keep one seed: whole activations want the same dropout on each of them.
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=base.parameter_groups(model), lr_scheduler=schedule(args), config=config
    )
    group = engine.data_parallel_group
    args.rank, args.world_size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    for step in range(args.max_steps):
        losses = []
        for inputs, targets in base.micro_batches(samples.data, step, args):
            losses.append(engine(inputs, targets))
            engine.backward(losses[-1])
            engine.step()
        base.log(f"step={step + 1} loss={mean_over_ranks(torch.stack(losses).mean().detach()).item():.6f}")
    show_held(f"{args.n_head // args.tensor_ranks} of {args.n_head} heads", engine)


if __name__ == "__main__":
    start(main, __doc__, ds_config="zero1.json", tensor_ranks=2)
