"""What each way to divide a model costs: model states a rank keeps, and what it sends in a step of one sequence a rank.

    python examples/costs.py
    python examples/costs.py --d_model 8192 --n_layer 80 --n_head 64 --block_size 4096

Arithmetic only, in 16 bits. P parameters, N ranks, of which groups of G (at most 8, the GPUs of a host) divide the
model; the N/G groups read other samples. There are as many sequences as ranks: a group trains its G sequences together.
A = G x tokens x d_model elements, the activations of a group between two blocks.

ZeRO-3              16P/N bytes                     sends 3P (N-1)/N
pipeline, ZeRO-1    4P/G + 12P/N                    sends A to each neighbour, at the ends also the tied embedding's
                    gradient, and 2P/G between groups; the embedding's second copy is not counted
tensor, ZeRO-1      4P/G + 12P/N                    sends 4 all-reduces of A a block, and 2P/G between groups
                    (AutoTP leaves the embeddings whole, here they count as divided)
sequence, ZeRO-3    16P/N, activations A/G          sends ZeRO-3's with gradients in 32 bits, 4P (N-1)/N, and 8
                    all-to-all of A/G a block
experts, ZeRO-1     G experts in each second block, one on a rank: 4P + 12E G/N + 12 (P-E)/N, where E of the dense
                    model's parameters are an expert now; sends 4 all-to-all of 1.25 A/G, the capacity, in each
                    such block, and the gradients. The model has (G-1) E more parameters than the others
An all-reduce sends 2 (G-1)/G of its size, an all-to-all (G-1)/G.

Source: ZeRO, arXiv:1910.02054; the docstrings of the examples beside this one
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts" / "tools"))
from common import table
from plan_memory import Model, formula


def between(elements, groups):
    """Gradients of so many elements, averaged over groups, by the paper's count."""
    return 2 * elements * (groups - 1) / groups


def ways(model, ranks):
    """By name: the model's parameters, a rank's bytes of states, and the elements that it sends."""
    parameters, group = model.parameters, min(8, ranks)
    groups, inside = ranks // group, (group - 1) / group
    activations = group * model.block_size * model.d_model
    embedding = model.vocab_size * model.d_model
    zero3 = sum(formula(parameters, ranks, 3).values())
    divided = 4 * parameters / group + 12 * parameters / ranks
    weights = parameters * (ranks - 1) / ranks  # gathered once
    neighbours = max(activations + embedding, activations * (2 if group > 2 else 1))  # of the busiest stage
    reduces = 4 * model.n_layer * activations * 2 * inside
    layers = model.n_layer // 2
    experts = layers * 8 * model.d_model**2
    own = activations / group
    held = 4 * parameters + 12 * experts / groups + 12 * (parameters - experts) / ranks
    gradients = between(experts, groups) + between(parameters - experts, ranks)
    return {
        "ZeRO-3": (parameters, zero3, 3 * weights),
        "pipeline, ZeRO-1": (parameters, divided, neighbours + between(parameters / group, groups)),
        "tensor, ZeRO-1": (parameters, divided, reduces + between(parameters / group, groups)),
        "sequence, ZeRO-3": (parameters, zero3, 4 * weights + 8 * model.n_layer * own * inside),
        "experts, ZeRO-1": (parameters + (group - 1) * experts, held, 4 * layers * 1.25 * own * inside + gradients),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"n_layer": 32, "n_head": 32, "d_model": 4096, "block_size": 4096, "vocab_size": 50304}
    for name, default in shape.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64], help="powers of two (2 8 64)")
    args = parser.parse_args()
    if any(count < 2 or count & (count - 1) for count in args.ranks):
        parser.error(f"--ranks {args.ranks}: powers of two, from 2")
    model = Model(**{name: getattr(args, name) for name in shape})
    found = [ways(model, ranks) for ranks in args.ranks]
    for column, what, unit in (
        (0, "parameters, 10**9", 1e9),
        (1, "states of a rank, GiB", 2**30),
        (2, "sent, GB", 5e8),
    ):
        rows = [[name, *(f"{each[name][column] / unit:.2f}" for each in found)] for name in found[0]]
        print("\n" + table([what, *(f"{ranks} ranks" for ranks in args.ranks)], rows))


if __name__ == "__main__":
    main()
