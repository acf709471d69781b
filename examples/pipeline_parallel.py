"""This GPT as a pipeline: each rank holds some of the layers, and micro batches travel from rank to rank.

With two stages on two ranks, rank 0 holds the embeddings and the first blocks, rank 1 the other blocks, the head and
the loss. While rank 1 works on a micro batch, rank 0 works on the next one; each does a forward and a backward pass in
turn (1F1B). They send activations, batch x seq x d_model elements a micro batch each way, and once a step the gradient
of the tied embedding, which both hold.
On four ranks two such pipelines stand side by side, each with its half of the samples: pipeline x data parallelism.
ZeRO-1 then partitions a stage's optimizer states over its two copies. DeepSpeed refuses ZeRO-2 and ZeRO-3 in a
pipeline. Tensor parallelism inside of a stage has to come from the layers themselves, as in Megatron-DeepSpeed: AutoTP
in a PipelineModule, tried on 2 x 2 ranks, fails in its first broadcast (0.19.8).

Run:
    torchrun --nproc_per_node 2 examples/pipeline_parallel.py --dataset sample --n_layer 4 --d_model 96 --max_steps 10
    torchrun --nproc_per_node 4 examples/pipeline_parallel.py --dataset sample --n_layer 4 --d_model 96 --max_steps 10

Source: PipeDream-Flush in arXiv:2006.09503; https://www.deepspeed.ai/tutorials/pipeline/
"""

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from shared import RANK, RANKS, base, must_divide, prepare, schedule, show_held, start, start_ranks
from torch import nn


class Tokens(nn.Embedding):
    def __init__(self, weight):
        super().__init__(*weight.shape)
        self.weight.data.copy_(weight)


class Positions(nn.Module):
    def __init__(self, weight, args):
        super().__init__()
        self.position_embedding = Tokens(weight)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x):  # (batch, seq, d_model)
        return self.dropout(x + self.position_embedding.weight[: x.shape[1]])


class Block(base.TransformerBlock):
    def __init__(self, weights, args):
        super().__init__(args)
        self.load_state_dict(weights)


class FinalNorm(nn.Module):
    def __init__(self, weights, args):
        super().__init__()
        self.norm = nn.LayerNorm(args.d_model)
        self.norm.load_state_dict(weights)

    def forward(self, x):
        return self.norm(x)


def head(tokens, x):
    return F.linear(x, tokens.weight)  # (batch, seq, rows)


def mean_loss(logits, targets):
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def layers_of(model, args):
    """What DeepSpeed builds a stage's layers from. model: the whole GPT, for Base's weights.

    The list keeps it in host memory. In a run of your own a layer draws or loads its weights itself.
    """
    tokens, positions = model.token_embedding.weight, model.position_embedding.weight
    return [
        TiedLayerSpec("tokens", Tokens, tokens),
        LayerSpec(Positions, positions, args),
        *[LayerSpec(Block, block.state_dict(), args) for block in model.blocks],
        LayerSpec(FinalNorm, model.final_norm.state_dict(), args),
        TiedLayerSpec("tokens", Tokens, tokens, forward_fn=head),  # on the last stage: its own copy, the same gradient
    ]


def main(args, config):
    must_divide("stages", args, ranks=RANKS)
    if args.stages > args.n_layer:
        raise base.UserError(f"--stages {args.stages} is more than --n_layer {args.n_layer}")
    start_ranks(args, config, 1, "a pipeline accumulates whole gradients")
    config["gradient_accumulation_steps"] = args.micro_batches
    model, samples = prepare(args, config)
    torch.manual_seed(args.seed + RANK)  # dropout differs from rank to rank
    # By blocks: by their parameters, the default, a large embedding would be a stage of its own.
    layers = layers_of(model, args)
    pipe = PipelineModule(layers, num_stages=args.stages, loss_fn=mean_loss, partition_method="type:Block")
    engine, *_ = deepspeed.initialize(
        model=pipe, model_parameters=base.parameter_groups(pipe), lr_scheduler=schedule(args), config=config
    )
    args.rank, args.world_size = engine.grid.get_data_parallel_rank(), engine.grid.get_data_parallel_world_size()
    for step in range(args.max_steps):
        loss = engine.train_batch(base.micro_batches(samples.data, step, args))  # forward, backward and step
        base.log(f"step={step + 1} loss={loss.item():.6f}")
    show_held(f"stage {engine.stage_id}", engine)


if __name__ == "__main__":
    start(main, __doc__, ds_config="zero1.json", stages=2, micro_batches=4)
