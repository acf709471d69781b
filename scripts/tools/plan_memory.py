"""Which ZeRO stage fits: bytes by stage of a model on so many ranks, beside the memory of GPUs and hosts.

    python scripts/tools/plan_memory.py --n_layer 24 --n_head 16 --d_model 1024 --block_size 1024 --ranks 4 --gpus 24
    python scripts/tools/plan_memory.py --parameters 7.5B --ranks 64 --gpus 80 --host_gib 1000 --link_gb_s 25
    python scripts/tools/plan_memory.py --parameters 1.5B --ranks 4 --ranks_per_host 2 --gpus 24,48
    python scripts/tools/plan_memory.py --ranks 4 --link_gb_s 1.2 --rank_tokens_per_second 9000 --scaling 1,2,4

A row for each JSON of configs/, or of --ds_config; without --parameters the shape counts. It is arithmetic: no model is
built. Columns, in GiB (2**30 bytes) of one rank where nothing else is said:
formula        model states by ZeRO, arXiv:1910.02054, section 3.1
DeepSpeed      what DeepSpeed's own estimators say of a GPU and of a host
buffers        the JSON's buckets, gradients on their way, and at stage 3 the weights that stay gathered
peak           the fullest moment on a GPU, activations and logits with it: forward's end, backward's start or end, step
checkpointing  the same with --activation_checkpointing
host           all ranks of the first host: at the start (stages 0 to 2 build the model in fp32 there), or when it
               saves, offloaded states and the whole weights that rank 0 takes there
largest        the most parameters that fit the smallest GPU and host, with --activation_checkpointing

What the sums rest on is in tests/unit/test_plan_memory.py. On GPUs:
not measured.
Left out, and covered by --reserve_gib only: CUDA's context, NCCL's buffers, fragmentation. ZeRO gives all ranks equal
shares, so of unlike GPUs the smallest decides. Communication counts bytes over a rank's slowest link: no latency, and
not what an offload copies to host memory or disk. Without --host_gib host memory is printed, but not judged.

Exit code 0: printed, 1: a JSON cannot be planned for, 2: wrong usage.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hjson

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ("zero1", "zero2", "zero3", "zero_offload", "zero3_offload", "zero_infinity")
WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}  # bytes of a weight, an activation, a gradient
GIB, SUFFIXES = 2**30, {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
DEFAULTS = {  # DeepSpeed's, of the keys of zero_optimization that cost memory or time
    "reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": 5e7, "stage3_max_reuse_distance": 1e9,
    "sub_group_size": 1e9,
}  # fmt: skip


class Model(NamedTuple):
    n_layer: int
    n_head: int
    d_model: int
    block_size: int
    vocab_size: int  # rows of the embedding, padded to a multiple of 64
    given: int = 0  # parameters, where the shape is only a guess from them

    @property
    def parameters(self) -> int:
        d = self.d_model
        blocks = self.n_layer * (12 * d * d + 13 * d)  # attention 4d2 + 4d, feed-forward 8d2 + 5d, two norms 4d
        return self.given or blocks + (self.vocab_size + self.block_size) * d + 2 * d

    @property
    def embedding(self) -> int:
        return self.vocab_size * self.d_model

    @property
    def largest(self) -> int:
        """Elements of the largest weight."""
        return max(self.embedding, 4 * self.d_model**2)


class Plan(NamedTuple):
    """A JSON, as far as it costs memory or time."""

    name: str
    config: str | None  # path; None: no JSON, as GPTLike-Base.py
    stage: int
    optimizer: str  # where it lives: gpu, cpu or nvme
    params: str
    micro_batch: int
    accumulation: int
    precision: str
    zero: dict

    def number(self, key: str, section: str = "", default: float = 0) -> int:
        return int((self.zero.get(section) or {}).get(key, default) if section else self.zero.get(key, DEFAULTS[key]))


class Machine(NamedTuple):
    ranks: int
    ranks_per_host: int
    gpus: tuple[float, ...]  # GiB, one for each kind
    hosts: tuple[float, ...]  # GiB; empty: not judged
    reserve: float


def shape_of(parameters: int, block_size: int, vocab_size: int) -> Model:
    """A usual shape with about so many parameters: width about 128 x layers, heads of 64."""
    usual, linear, shapes = round((parameters / (12 * 128**2)) ** (1 / 3)), vocab_size + block_size, []
    for n_layer in range(max(1, usual - 1), usual + 2):
        d_model = (math.sqrt(linear**2 + 48 * n_layer * parameters) - linear) / (24 * n_layer)
        d_model = max(64, 64 * round(d_model / 64))
        shapes.append(Model(n_layer, d_model // 64, d_model, block_size, vocab_size))
    return min(shapes, key=lambda shape: abs(shape.parameters - parameters))._replace(given=parameters)


# What one rank holds, in bytes
def formula(parameters: int, ranks: int, stage: int, precision: str = "bf16") -> dict[str, float]:
    """Model states by the paper; like the scripts' ledger, with fp32 at stages 1 to 3 as DeepSpeed has it."""
    width = WIDTH[precision]
    states = 8 if precision == "fp32" and stage == 0 else 12  # Adam's two, and a copy of the weights in fp32
    sizes = {"parameters": (3, width), "gradients": (2, width), "optimizer_states": (1, states)}
    return {kind: parameters * unit / (ranks if stage >= first else 1) for kind, (first, unit) in sizes.items()}


def own_gradients(model: Model, plan: Plan, ranks: int) -> float:
    """Bytes, of the parameters that this rank updates. At stages 1 and 2 one that the partition cuts is kept whole: on
    rank 0 the embedding, where it is larger than a partition."""
    share = model.parameters / ranks
    whole = model.embedding if plan.stage < 3 and plan.optimizer == "gpu" else 0
    return WIDTH[plan.precision] * max(share, whole)


def ledger(model: Model, plan: Plan, ranks: int) -> dict[str, float]:
    """What rank 0 prints as held between a backward pass and a step. The formula but for the gradients: stage 1 keeps
    no more than its own either, stage 3 its bucket, and the offloads what the CPU's Adam works on."""
    width, share = WIDTH[plan.precision], model.parameters / ranks
    states = formula(model.parameters, ranks, plan.stage, plan.precision)
    held = own_gradients(model, plan, ranks) if plan.stage else width * model.parameters
    if plan.stage == 3:
        held += width * plan.number("reduce_bucket_size")
    elif plan.optimizer == "cpu":
        held += 2 * width * model.largest  # staging, one buffer on each side
    if plan.optimizer == "cpu":
        held += 4 * share  # fp32 gradients
    kept = {kind: states[kind] for kind in ("parameters", "optimizer_states")}
    return kept | {"gradients_and_buckets": held}


class Activations(NamedTuple):
    """Bytes of one micro batch."""

    kept: float  # from the forward pass to the backward pass
    edge: float  # of that, outside of the blocks
    block: float  # what is kept for one block; with checkpointing, while it is recomputed
    working: float  # what a block's own backward pass adds, about: gradients on their way through it


def activations(model: Model, plan: Plan, *, dropout: float, checkpointing: bool) -> Activations:
    """Kept are 16 x width elements a token and block (norms' inputs 2, qkv's input 1, q, k and v 3, attention's output
    1, the feed-forward's 1 + 4 + 4), dropout's masks and a few fp32 statistics; with checkpointing each block's input;
    and outside of the blocks the last norm's two sides and the log-probabilities of the loss in fp32."""
    tokens, mask = plan.micro_batch * model.block_size, 1 if dropout else 0
    unit = tokens * model.d_model * WIDTH[plan.precision]
    block = 16 * unit + tokens * (2 * mask * model.d_model + 4 * model.n_head + 16)
    inner, edge = model.n_layer * (unit if checkpointing else block), 2 * unit + mask * tokens * model.d_model
    edge += 4 * tokens * model.vocab_size
    return Activations(inner + edge, edge, block, 5 * unit)


def logits(model: Model, plan: Plan) -> dict[str, float]:
    """Beside the log-probabilities. Forward: logits, and in 16 bits their copy in fp32. Backward: the gradients of the
    log-probabilities and of the logits, both in fp32."""
    width, elements = WIDTH[plan.precision], plan.micro_batch * model.block_size * model.vocab_size
    return {"forward": (width + (4 if width == 2 else 0)) * elements, "backward": 8 * elements}


def stays_gathered(model: Model, plan: Plan) -> float:
    """Elements of weights that stage 3 keeps whole between forward and backward pass: those whose next use is at most
    stage3_max_reuse_distance elements away, there and back; and what is fetched ahead."""
    near = plan.number("stage3_max_reuse_distance") / 2 + plan.number("stage3_prefetch_bucket_size")
    block = 12 * model.d_model**2 if plan.zero.get("leaf_module") else 0  # gathered as one
    return min(model.parameters, near + max(model.largest, block))


def resident(model: Model, plan: Plan, ranks: int) -> float:
    """Held on the GPU all the time beside model states: see the docstring on "buffers"."""
    width = WIDTH[plan.precision]
    if plan.stage == 3:
        return width * (stays_gathered(model, plan) + plan.number("reduce_bucket_size"))
    if plan.stage == 0:
        return width * model.parameters if ranks > 1 else 0  # DDP's buckets
    if plan.stage == 1:  # its bucket is there in the forward pass, too
        return width * plan.number("reduce_bucket_size")
    return width * model.largest if plan.optimizer == "cpu" else 0


def bucket(model: Model, plan: Plan) -> float:
    """Of the backward pass alone: stage 2 fills a bucket, stages 1 and 2 another with overlap_comm; and a gradient on
    its way."""
    if plan.stage == 0:
        return 0
    buckets = {1: 0, 2: 1, 3: 0}[plan.stage] + (1 if plan.stage < 3 and plan.zero.get("overlap_comm") else 0)
    return WIDTH[plan.precision] * (buckets * plan.number("reduce_bucket_size") + model.largest)


def gradients(model: Model, plan: Plan, ranks: int) -> dict[str, float]:
    """Bytes of gradients, and of what they travel in, on the GPU by part of a training step: the forward pass; of the
    backward pass the head, the last block, which comes first, the first block, and the end; the optimizer's step."""
    width, share = WIDTH[plan.precision], model.parameters / ranks
    whole, own, way = width * model.parameters, own_gradients(model, plan, ranks), bucket(model, plan)
    parts = ("forward", "head", "last block", "first block", "end", "step")
    if plan.optimizer != "gpu":
        return dict(zip(parts, (0, way, way, way, way, 0), strict=True))
    if plan.stage == 3:
        step = own + (4 + width) * min(share, plan.number("sub_group_size"))
        return dict(zip(parts, (own, *[own + way] * 4, step), strict=True))
    # In the step of stages 1 and 2: the rank's own gradients, the same flattened, and that in fp32.
    several = plan.accumulation > 1  # then gradients stay from one micro batch to the next
    if plan.stage == 2:
        return dict(zip(parts, (own * several, *[own + way] * 4, 8 * share), strict=True))
    embedding, block = width * model.embedding, 12 * width * model.d_model**2  # the former comes from both of its uses
    last = max(whole * several, embedding)
    end, step = (whole + own + way, 8 * share) if plan.stage == 1 else (whole + 2 * embedding, 4 * model.parameters)
    return dict(zip(parts, (whole * several, whole * several, last, whole - block, end, step), strict=True))


def moments(model: Model, plan: Plan, ranks: int, *, dropout: float, checkpointing: bool) -> dict[str, float]:
    """Bytes on the GPU when they are the most, in each part of a training step."""
    states = formula(model.parameters, ranks, plan.stage, plan.precision)
    fixed = resident(model, plan, ranks)
    fixed += states["parameters"] if plan.params == "gpu" else 0
    fixed += states["optimizer_states"] if plan.optimizer == "gpu" else 0
    held, head = gradients(model, plan, ranks), logits(model, plan)
    kept, edge, block, working = activations(model, plan, dropout=dropout, checkpointing=checkpointing)
    inner = kept - edge + (block if checkpointing else 0)
    return {
        "forward": fixed + held["forward"] + kept + head["forward"],
        "head": fixed + held["head"] + kept + head["backward"],
        "last block": fixed + held["last block"] + inner + working,
        "first block": fixed + held["first block"] + block + working,
        "end": fixed + held["end"],
        "step": fixed + held["step"],
    }


def peak(model: Model, plan: Plan, ranks: int, *, dropout: float, checkpointing: bool) -> float:
    return max(moments(model, plan, ranks, dropout=dropout, checkpointing=checkpointing).values())


def offloaded(model: Model, plan: Plan, ranks: int) -> float:
    """Bytes that one rank keeps in host memory while it trains."""
    width, share, held = WIDTH[plan.precision], model.parameters / ranks, 0.0
    if plan.optimizer == "cpu":  # 16-bit: stage 2 stages the updated weights there, stage 3 keeps its gradients there
        held += (12 + 4 + width) * share  # Adam's states, fp32 gradients, 16-bit ones
    if plan.optimizer == "cpu" and plan.stage < 3:
        held += width * (model.largest + (share if plan.accumulation > 1 else 0))
    if plan.params != "gpu":
        held += width * share
    if plan.optimizer == "nvme":
        group = min(share, plan.number("sub_group_size"))
        held += width * share + 4 * group * plan.number("buffer_count", "offload_optimizer", 4)
    if plan.params == "nvme":
        buffers = plan.number("buffer_count", "offload_param", 5) * plan.number("buffer_size", "offload_param", 1e8)
        held += width * buffers
    return held


def host_bytes(model: Model, plan: Plan, machine: Machine) -> float:
    """Of all ranks of the first host, at the fullest moment of a run: each rank's model in fp32 at the start of stages
    0 to 2, or what is offloaded and the whole weights that rank 0 alone takes to the CPU to save them."""
    start = 4 * model.parameters if plan.stage < 3 else 0
    held = offloaded(model, plan, machine.ranks)
    return max(start * machine.ranks_per_host, held * machine.ranks_per_host + WIDTH[plan.precision] * model.parameters)


def nvme_bytes(model: Model, plan: Plan, ranks: int) -> float:
    """Of one rank in swap files."""
    share = model.parameters / ranks
    states = (12 + 4) * share if plan.optimizer == "nvme" else 0  # fp32 gradients are swapped, too
    return states + (WIDTH[plan.precision] * share if plan.params == "nvme" else 0)


def deepspeed_estimate(model: Model, plan: Plan, machine: Machine) -> tuple[int, int] | None:
    """(GPU, host) bytes that DeepSpeed's own estimators give; None where it has none."""
    if plan.stage < 2 or "nvme" in (plan.optimizer, plan.params):
        return None
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # no GPU is needed to estimate, and none is taken
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as estimate3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as estimate2

    nodes = machine.ranks / machine.ranks_per_host  # of unlike hosts the fullest counts, and its share is no 1/n
    size = {"num_gpus_per_node": machine.ranks_per_host, "num_nodes": nodes, "cpu_offload": plan.optimizer == "cpu"}
    if plan.stage == 2:
        host, gpu = estimate2(model.parameters, **size)
    else:
        layer = max(model.embedding, 4 * model.d_model * (model.d_model + 1))
        host, gpu, _ = estimate3(model.parameters, layer, cpu_offload_params=plan.params == "cpu", **size)
    return gpu, host


# Time
def sent(model: Model, plan: Plan, ranks: int) -> tuple[float, float]:
    """Bytes that a rank sends in an optimizer step: by the paper, and as DeepSpeed 0.19.8 does it. That all-reduces
    gradients at stages 1 and 2 instead of scattering them, unless told otherwise; gathers at stage 3 a second time only
    what has not stayed gathered; and from stage 2 on sends for each micro batch."""
    weights = model.parameters * WIDTH[plan.precision] * (ranks - 1) / ranks
    times = plan.accumulation if plan.stage >= 2 else 1
    reduce = 2 if plan.stage in (1, 2) and plan.zero.get("use_multi_rank_bucket_allreduce", True) else 1
    again = 1 - stays_gathered(model, plan) / model.parameters
    paper = (3 if plan.stage == 3 else 2) * weights
    return paper, weights * {0: 2, 1: reduce + 1, 2: reduce * times + 1, 3: (2 + again) * times}[plan.stage]


class Rates(NamedTuple):
    """What --scaling predicts of one number of ranks: tokens a second of all ranks together."""

    ranks: int
    weak: float  # each rank keeps its micro batch
    strong: float  # all ranks share one rank's micro batch


def predict(model: Model, plan: Plan, ranks: int, *, link: float, one_rank: float) -> Rates:
    """A step takes the time of computing, as measured on one rank, and after that the time of sending."""
    tokens = plan.micro_batch * plan.accumulation * model.block_size
    send = sent(model, plan, ranks)[1] / (link * 1e9)
    return Rates(ranks, ranks * tokens / (tokens / one_rank + send), tokens / (tokens / one_rank / ranks + send))


# Verdicts
def verdict(model: Model, plan: Plan, machine: Machine, gpu: float, *, dropout: float) -> str:
    """fits, checkpointing (fits with --activation_checkpointing), or no with what is too small."""
    room, word = (gpu - machine.reserve) * GIB, ""
    for name, on in (("checkpointing", True), ("fits", False)):
        word = name if peak(model, plan, machine.ranks, dropout=dropout, checkpointing=on) <= room else word
    host = host_bytes(model, plan, machine)
    short_of = [] if word else ["GPU"]
    short_of += ["host"] if machine.hosts and host > min(machine.hosts) * GIB else []
    return f"no: {', '.join(short_of)}" if short_of else word


def largest_model(model: Model, plan: Plan, machine: Machine, *, dropout: float) -> int:
    """Parameters, by bisection over usual shapes; 0 where not even a million fits."""

    def fits(parameters: int) -> bool:
        other = shape_of(parameters, model.block_size, model.vocab_size)
        return not verdict(other, plan, machine, min(machine.gpus), dropout=dropout).startswith("no")

    low, high = 10**6, 10**15
    if not fits(low):
        return 0
    while high > low * 1.005:
        middle = math.isqrt(low * high)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# The JSON
def read_plan(path: Path, args: argparse.Namespace) -> Plan:
    """Raises ValueError, naming file and key, where there is nothing to plan with."""
    try:
        config = hjson.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or not config:
        raise ValueError(f"{path} is no JSON object, or an empty one")
    for key in ("zero_optimization", "optimizer", "bf16", "fp16"):
        if not isinstance(config.get(key, {}), dict):
            raise ValueError(f"{path}: {key} is no object")
    zero = config.get("zero_optimization", {})
    for key in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(key) or {}, dict):
            raise ValueError(f"{path}: zero_optimization.{key} is no object")
    if str(name := config.get("optimizer", {}).get("type", "AdamW")).lower() not in ("adam", "adamw"):
        raise ValueError(f"{path}: optimizer.type is {name}, and only Adam and AdamW are planned for")
    check_numbers(path, config, zero)
    places = [(zero.get(f"offload_{what}") or {}).get("device", "none") for what in ("optimizer", "param")]
    optimizer, params = ("gpu" if place in ("none", None) else str(place) for place in places)
    stage = zero.get("stage", 0)
    if not {optimizer, params} <= {"gpu", "cpu", "nvme"}:
        raise ValueError(f"{path}: an offload device is none, cpu or nvme")
    if (params != "gpu" or optimizer == "nvme") and stage != 3 or optimizer == "cpu" and stage == 0:
        raise ValueError(f"{path}: stage {stage} cannot offload that; parameters and NVMe need stage 3")
    precision = next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")), "fp32")
    return Plan(plan_name(stage, optimizer, params), str(path), stage, optimizer, params,
                args.batch_size or config.get("train_micro_batch_size_per_gpu", 1),
                args.gradient_accumulation_steps or config.get("gradient_accumulation_steps", 1),
                args.precision or precision, zero)  # fmt: skip


def check_numbers(path: Path, config: dict, zero: dict) -> None:
    """Raises ValueError where a number that is needed is none."""
    if type(stage := zero.get("stage", 0)) is not int or stage not in (0, 1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage is {stage!r}: write 0, 1, 2 or 3")
    counts = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    found = {key: config[key] for key in counts if key in config}
    found |= {f"zero_optimization.{key}": zero[key] for key in DEFAULTS if key in zero}
    for section in ("offload_optimizer", "offload_param"):
        keys = {"buffer_count", "buffer_size"} & (zero.get(section) or {}).keys()
        found |= {f"zero_optimization.{section}.{key}": zero[section][key] for key in keys}
    for key, value in sorted(found.items()):
        whole = "." not in key
        if type(value) not in ((int,) if whole else (int, float)) or not whole <= value < 2**63:
            raise ValueError(f"{path}: {key} is {value!r}, no number from {int(whole)} on")


def plan_name(stage: int, optimizer: str, params: str) -> str:
    if stage == 0:
        return "no ZeRO (DDP)"
    if "nvme" in (optimizer, params):
        return "ZeRO-Infinity, NVMe"
    moved = ["optimizer"] * (optimizer == "cpu") + ["parameters"] * (params == "cpu")
    return f"ZeRO-{stage}" + (f", {' and '.join(moved)} on CPU" if moved else "")


# Flags
def count(text: str) -> int:
    """7.5e9, 7.5B, 124M or 1T."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?)([KMBT]?)", text)
    if not found or not 1e3 <= (number := float(found[1]) * SUFFIXES[found[2]]) <= 1e15:
        raise argparse.ArgumentTypeError(f"{text}: write parameters as 124M, 7.5B, 1T or 7.5e9")
    return round(number)


def positive(kind: type) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < 2**31:
            raise argparse.ArgumentTypeError(f"{text} is no number above 0 and below 2**31")
        return value

    return read


def several(kind: type) -> Callable[[str], tuple[float, ...]]:
    return lambda text: tuple(positive(kind)(part) for part in text.split(","))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    whole, real = positive(int), positive(float)
    add = parser.add_argument_group("model").add_argument
    add("--parameters", type=count, metavar="COUNT", help="124M, 7.5B, ...: the shape is then a usual one")
    add("--n_layer", type=whole, help="transformer blocks (6)")
    add("--n_head", type=whole, help="attention heads per block (12)")
    add("--d_model", type=whole, help="width of the residual stream (768)")
    add("--vocab_size", type=whole, default=50257, help="tokens of the tokenizer (%(default)s, GPT-2's)")
    add("--block_size", type=whole, default=256, help="tokens per sequence (%(default)s)")
    add("--dropout", type=float, default=0.1, help="0 saves its masks (%(default)s)")
    add = parser.add_argument_group("training; left out, the JSON's number").add_argument
    add("--batch_size", type=whole, help="micro batch: sequences per rank per forward")
    add("--gradient_accumulation_steps", type=whole, help="micro batches per optimizer step")
    add("--precision", choices=list(WIDTH), help="of weights and activations")
    add("--ds_config", type=Path, nargs="+", metavar="FILE", help="JSONs (those of configs/, and no ZeRO at all)")
    add = parser.add_argument_group("machines").add_argument
    add("--ranks", type=whole, default=1, help="GPUs of all hosts together (%(default)s)")
    add("--ranks_per_host", type=whole, help="the most on one host (8, or --ranks if that is less)")
    add("--gpus", type=several(float), default=(24.0,), metavar="GIB,...", help="GiB of each kind of GPU (24)")
    add("--host_gib", type=several(float), default=(), metavar="GIB,...", help="GiB of a host; left out: not judged")
    add("--reserve_gib", type=float, default=2.0, help="kept free on each GPU: an assumption (%(default)s)")
    add = parser.add_argument_group("time").add_argument
    add("--link_gb_s", type=real, help="10**9 bytes a second that a rank can send, at the slowest place")
    add("--rank_tokens_per_second", type=real, help="measured on one rank alone")
    add("--scaling", type=several(int), default=(), metavar="RANKS,...", help="predict weak and strong scaling")
    parser.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes")
    return parser


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    shape = [f"--{name}" for name in ("n_layer", "n_head", "d_model") if getattr(args, name)]
    if args.parameters and shape:
        parser.error(f"--parameters and {' '.join(shape)}: give the one or the other")
    args.n_layer, args.n_head, args.d_model = args.n_layer or 6, args.n_head or 12, args.d_model or 768
    if args.d_model % args.n_head:
        parser.error(f"--d_model {args.d_model} is not a multiple of --n_head {args.n_head}")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout {args.dropout} must be at least 0 and below 1")
    if not 0 <= args.reserve_gib < min(args.gpus):
        parser.error(f"--reserve_gib {args.reserve_gib} must be at least 0 and below the smallest of --gpus")
    args.ranks_per_host = args.ranks_per_host or min(8, args.ranks)
    if args.ranks_per_host > args.ranks:
        parser.error(f"--ranks_per_host {args.ranks_per_host} is more than --ranks {args.ranks}")
    if args.rank_tokens_per_second and not args.link_gb_s:
        parser.error("--rank_tokens_per_second needs --link_gb_s")
    if args.scaling and not args.rank_tokens_per_second:
        parser.error("--scaling needs --rank_tokens_per_second, measured on one rank, and --link_gb_s")


# Output
def stage_facts(model: Model, plan: Plan, machine: Machine, *, dropout: float) -> dict:
    """A row as numbers: bytes of one rank, but host and NVMe of one host."""
    peaks = [peak(model, plan, machine.ranks, dropout=dropout, checkpointing=on) for on in (False, True)]
    alive = [activations(model, plan, dropout=dropout, checkpointing=on) for on in (False, True)]
    states = formula(model.parameters, machine.ranks, plan.stage, plan.precision)
    estimate = deepspeed_estimate(model, plan, machine)
    return {
        "stage": plan.name,
        "ds_config": plan.config,
        "formula": sum(states.values()),
        "ledger": ledger(model, plan, machine.ranks) if plan.optimizer != "nvme" else None,
        "deepspeed_gpu": estimate and estimate[0],
        "deepspeed_host": estimate and estimate[1],
        "buffers": resident(model, plan, machine.ranks) + bucket(model, plan),
        "activations": alive[0].kept,
        "activations_checkpointing": alive[1].kept + alive[1].block,
        "logits": max(logits(model, plan).values()),
        "peak": peaks[0],
        "peak_checkpointing": peaks[1],
        "host": host_bytes(model, plan, machine),
        "nvme": nvme_bytes(model, plan, machine.ranks) * machine.ranks_per_host,
        "verdicts": {f"{gpu:g}": verdict(model, plan, machine, gpu, dropout=dropout) for gpu in machine.gpus},
        "largest": largest_model(model, plan, machine, dropout=dropout),
    }


def time_facts(model: Model, plans: list[Plan], args: argparse.Namespace) -> dict[str, list[dict]]:
    """Communication and, if asked for, scaling: a row for each stage, since an offload sends as its stage does."""
    by_stage = {plan.stage: plan._replace(name=plan_name(plan.stage, "gpu", "gpu")) for plan in reversed(plans)}
    plans = [by_stage[stage] for stage in sorted(by_stage)]
    speed = {"link": args.link_gb_s, "one_rank": args.rank_tokens_per_second}
    scaling = [{"stage": plan.name} | predict(model, plan, ranks, **speed)._asdict()
               for plan in plans for ranks in args.scaling]  # fmt: skip
    rows = [link_facts(model, plan, args) for plan in plans] if args.link_gb_s else []
    return {"communication": rows, "scaling": scaling}


def link_facts(model: Model, plan: Plan, args: argparse.Namespace) -> dict:
    paper, really = sent(model, plan, args.ranks)
    seconds = really / (args.link_gb_s * 1e9)
    tokens = plan.micro_batch * plan.accumulation * model.block_size
    compute = tokens / args.rank_tokens_per_second if args.rank_tokens_per_second else 0
    bound = args.ranks * tokens / max(compute, seconds) if max(compute, seconds) else None
    return {"stage": plan.name, "sent_formula": paper, "sent": really, "seconds": seconds, "compute_seconds": compute,
            "tokens_per_second_bound": bound}  # fmt: skip


def facts(args: argparse.Namespace) -> dict:
    """All that is printed, as one JSON object. Raises ValueError where a JSON cannot be planned for."""
    rows = -(-args.vocab_size // 64) * 64
    if args.parameters:
        model = shape_of(args.parameters, args.block_size, rows)
    else:
        model = Model(args.n_layer, args.n_head, args.d_model, args.block_size, rows)
    plain = Plan(plan_name(0, "gpu", "gpu"), None, 0, "gpu", "gpu", args.batch_size or 8,
                 args.gradient_accumulation_steps or 1, args.precision or "bf16", {})  # fmt: skip
    paths = args.ds_config or [ROOT / "configs" / f"{name}.json" for name in CONFIGS]
    plans = ([] if args.ds_config else [plain]) + [read_plan(path, args) for path in paths]
    machine = Machine(args.ranks, args.ranks_per_host, args.gpus, args.host_gib, args.reserve_gib)
    found = {"model": model._asdict() | {"parameters": model.parameters}, "machine": machine._asdict()}
    found["stages"] = [stage_facts(model, plan, machine, dropout=args.dropout) for plan in plans]
    least = f"{min(args.gpus):g}"
    found["smallest"] = next((row["stage"] for word in ("fits", "checkpointing") for row in found["stages"]
                              if row["verdicts"][least] == word), None)  # fmt: skip
    found |= time_facts(model, plans, args)
    return found


def table(rows: list[list[str]]) -> str:
    """Markdown; all columns but the first are aligned to the right."""
    rows = [rows[0], ["---", *["--:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def gib(size: float | None) -> str:
    return "-" if size is None else f"{size / GIB:,.2f}"


def short(number: int) -> str:
    """A count in three digits, rounded down: 7.49B."""
    name, unit = next(((name, unit) for name, unit in reversed(SUFFIXES.items()) if number >= unit), ("", 1))
    digits = 2 - int(math.log10(number / unit)) if number else 0
    return f"{math.floor(number / unit * 10**digits) / 10**digits:.{digits}f}{name}"


def memory_table(found: dict) -> str:
    sizes = list(found["stages"][0]["verdicts"])
    rows = [["stage", "formula", "DeepSpeed: GPU / host", "buffers", "peak", "checkpointing", "host", "NVMe",
             *(f"{size} GiB" for size in sizes), "largest"]]  # fmt: skip
    for row in found["stages"]:
        own = f"{gib(row['deepspeed_gpu'])} / {gib(row['deepspeed_host'])}" if row["deepspeed_gpu"] else "-"
        names = ("formula", "buffers", "peak", "peak_checkpointing", "host", "nvme")
        formula_, *others = (gib(row[name]) for name in names)
        rows.append([row["stage"], formula_, own, *others, *row["verdicts"].values(), short(row["largest"])])
    return table(rows)


def report(found: dict, args: argparse.Namespace) -> str:
    model, first = found["model"], found["stages"][0]
    guess = "about this shape: " if model["given"] else ""
    lines = [f"{model['parameters']:,} parameters; {guess}{model['n_layer']} layers, {model['n_head']} heads, width "
             f"{model['d_model']}, vocabulary {model['vocab_size']:,}, {model['block_size']} tokens; "
             f"{args.ranks} rank{'s' if args.ranks > 1 else ''}",
             f"activations of a rank: {gib(first['activations'])} GiB, with --activation_checkpointing "
             f"{gib(first['activations_checkpointing'])} GiB; logits: {gib(first['logits'])} GiB",
             "", memory_table(found), ""]  # fmt: skip
    smallest, least = found["smallest"], f"{min(args.gpus):g} GiB"
    lines += [f"The first that fits {least}: {smallest}" if smallest else f"Nothing here fits {least}"]
    if len(args.gpus) > 1:
        lines[-1] += " (all ranks hold equal shares: the smallest GPU decides)"
    if found["communication"]:
        rows = [["stage", "sent by formula, GB", "by DeepSpeed, GB", "sending, s", "computing, s", "tokens/s at most"]]
        for row in found["communication"]:
            times = [f"{row['seconds']:,.3f}", f"{row['compute_seconds']:,.3f}" if row["compute_seconds"] else "-"]
            bound = row["tokens_per_second_bound"]
            sizes = [f"{row[name] / 1e9:,.2f}" for name in ("sent_formula", "sent")]
            rows.append([row["stage"], *sizes, *times, f"{bound:,.0f}" if bound else "-"])
        lines += ["", f"A step of {args.ranks} ranks, each sending at {args.link_gb_s:g} GB/s:", "", table(rows)]
    if found["scaling"]:
        rows = [["stage", "ranks", "weak, tokens/s", "efficiency", "strong, tokens/s", "efficiency"]]
        for row in found["scaling"]:
            ideal = row["ranks"] * args.rank_tokens_per_second
            rates = [cell for rate in (row["weak"], row["strong"]) for cell in (f"{rate:,.0f}", f"{rate / ideal:.0%}")]
            rows.append([row["stage"], str(row["ranks"]), *rates])
        lines += ["", "Scaling, if nothing is sent while a rank computes:", "", table(rows)]
    return "\n".join(lines)


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    check_args(parser, args)
    try:
        found = facts(args)
    except ValueError as error:
        sys.exit(f"plan_memory.py: error: {error}")
    print(json.dumps(found, indent=2) if args.json else report(found, args))


if __name__ == "__main__":
    main()
