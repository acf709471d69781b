"""What a rank of each ZeRO stage will hold, and with --measure what it does hold.

    python scripts/tools/plan_memory.py --n_layer 24 --n_head 16 --d_model 1024 --block_size 1024 --ranks 4 --gpus 24
    python scripts/tools/plan_memory.py --measure DeepSpeed-GPTLike-ZeRO-2.py --ranks 2 --n_layer 2 --d_model 384

A row for each JSON of configs/, or of --ds_config, in GiB (2**30 bytes) of one rank. formula: model states by
arXiv:1910.02054, section 3.1. peak: the most at once in a step on a GPU, buffers, activations and logits included;
checkpointing: with --activation_checkpointing. host: all ranks of a host at the fullest moment: start (stages 0 to 2
build the model in fp32), training or saving. --reserve_gib alone is for CUDA's context, NCCL's buffers and
fragmentation. On GPUs it was not measured yet.

--measure trains three steps on the sample text with so many ranks, on this machine's GPUs or its CPU, and prints for
each part of the third step the most bytes that rank 0's tensors took at once, beside the plan.

Exit code 0: printed, 1: a JSON that cannot be planned for or a run that failed, 2: wrong usage.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import common
import hjson
from common import ROOT, ToolError

WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}  # bytes of a weight, an activation, a gradient
CONFIGS = [ROOT / "configs" / f"zero{name}.json" for name in ("1", "2", "3", "_offload", "3_offload", "_infinity")]


class Model(NamedTuple):
    n_layer: int
    n_head: int
    d_model: int
    block_size: int
    vocab_size: int

    @property
    def parameters(self):
        d = self.d_model
        blocks = self.n_layer * (12 * d * d + 13 * d)  # attention 4d2 + 4d, feed-forward 8d2 + 5d, two norms 4d
        return blocks + (self.vocab_size + self.block_size) * d + 2 * d

    @property
    def embedding(self):
        return self.vocab_size * self.d_model

    @property
    def largest(self):
        return max(self.embedding, 4 * self.d_model**2)  # elements of the largest weight


class Plan(NamedTuple):
    """A JSON, as far as it costs memory or time. zero: deepspeed.runtime.zero.config.DeepSpeedZeroConfig."""

    name: str
    stage: int
    optimizer: str  # where it lives: none (on the GPU), cpu or nvme
    params: str
    batch_size: int
    accumulation: int
    width: int
    dropout: float
    zero: object


def read_plan(path, args):
    """Of a JSON as the scripts read it; path None: GPTLike-Base.py has none. Raises ToolError that names the file."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    script = common.load_script(common.SCRIPTS[1])
    try:
        config = hjson.loads(path.read_text(), object_pairs_hook=dict) if path else {"bf16": {"enabled": True}}
        script.replace_auto(config, script.AUTO)
        zero = DeepSpeedZeroConfig(**config.get("zero_optimization", {}))
        on = {"bf16": (True, "auto"), "fp16": (True,)}  # "auto" is bf16
        enabled = [name for name, values in on.items() if config.get(name, {}).get("enabled") in values]
        optimizer = str(config.get("optimizer", {}).get("type", "AdamW"))
        batch_size = args.batch_size or int(config.get("train_micro_batch_size_per_gpu", 8))
        accumulation = args.gradient_accumulation_steps or int(config.get("gradient_accumulation_steps", 1))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ToolError(f"{path}: {error}") from error
    if optimizer.lower() not in ("adam", "adamw"):
        raise ToolError(f"{path}: optimizer.type is {optimizer}, and only Adam and AdamW are planned for")
    places = [str((part and part.device) or "none") for part in (zero.offload_optimizer, zero.offload_param)]
    if zero.stage < 3 and (places[0] == "nvme" or places[1] != "none"):
        raise ToolError(f"{path}: parameters, and anything to NVMe, are offloaded at stage 3 only")
    name = f"ZeRO-{int(zero.stage)}, {path.name}" if path else "no ZeRO (DDP)"
    width = WIDTH[args.precision or (enabled or ["fp32"])[0]]
    return Plan(name, int(zero.stage), *places, batch_size, accumulation, width, args.dropout, zero)


def gib(size):
    return f"{size / 2**30:,.2f}"


def formula(parameters, ranks, stage, width=2):
    """Model states by the paper, as the scripts' ledger prints them."""
    sizes = {"parameters": (3, width), "gradients": (2, width), "optimizer_states": (1, 12)}
    return {kind: parameters * unit / (ranks if stage >= first else 1) for kind, (first, unit) in sizes.items()}


def stays_gathered(model, plan):
    """Elements of weights that stage 3 keeps whole between forward and backward pass: those whose next use is at most
    stage3_max_reuse_distance elements away, there and back; and what is fetched ahead."""
    near = plan.zero.max_reuse_distance / 2 + plan.zero.prefetch_bucket_size
    block = 12 * model.d_model**2 if "TransformerBlock" in plan.zero.leaf_module.classes else 0  # gathered as one
    return min(model.parameters, near + max(model.largest, block))


def fixed(model, plan, ranks):
    """Held on the GPU all the time: model states, weights that stay gathered, buckets of communication."""
    states = formula(model.parameters, ranks, plan.stage, plan.width)
    size = states["parameters"] if plan.params == "none" else 0
    size += states["optimizer_states"] if plan.optimizer == "none" else 0
    if plan.stage == 3:
        return size + plan.width * (stays_gathered(model, plan) + plan.zero.reduce_bucket_size)
    if plan.stage == 0:
        return size + (plan.width * model.parameters if ranks > 1 else 0)  # DDP's buckets
    if plan.stage == 1:
        return size + plan.width * plan.zero.reduce_bucket_size
    return size + (0 if plan.optimizer == "none" else plan.width * model.largest)


def gradients(model, plan, ranks):
    """Bytes of gradients, and of what they travel in: in the forward pass, in the backward pass at the head, in the
    last block (which comes first), in the first block and at its end, and in the optimizer's step."""
    share = model.parameters / ranks
    # At stages 1 and 2 a weight that the border of two shares cuts is kept whole: on rank 0 the embedding.
    own = plan.width * max(share, model.embedding if plan.stage < 3 and plan.optimizer == "none" else 0)
    buckets = (plan.stage == 2) + (plan.stage in (1, 2) and bool(plan.zero.overlap_comm))
    way = plan.width * (buckets * plan.zero.reduce_bucket_size + model.largest)
    several = plan.accumulation > 1  # then gradients stay from one micro batch to the next
    if plan.optimizer != "none":
        return 0, way, way, way, way, 0
    if plan.stage == 3:
        return own, *[own + way] * 4, own + (4 + plan.width) * min(share, plan.zero.sub_group_size)
    if plan.stage == 2:
        return own * several, *[own + way] * 4, 8 * share  # the step: own ones, the same flattened, that in fp32
    whole, embedding = plan.width * model.parameters, plan.width * model.embedding  # it comes from both of its uses
    last, first = max(whole * several, embedding), whole - 12 * plan.width * model.d_model**2
    end, step = (whole + own + way, 8 * share) if plan.stage else (whole + 2 * embedding, 4 * model.parameters)
    return whole * several, whole * several, last, first, end, step


def moments(model, plan, ranks, checkpointing=False):
    """The most bytes on the GPU in each part of a training step.

    Activations kept from forward to backward pass are 16 x width elements a token and block (inputs of the norms 2, of
    qkv 1, q, k and v 3, attention's output 1, the feed-forward's 1 + 4 + 4), dropout's masks and fp32 statistics; with
    checkpointing each block's input. Outside of the blocks: the last norm's two sides, the loss's log-probabilities.
    """
    tokens, mask = plan.batch_size * model.block_size, 1 if plan.dropout else 0
    unit = tokens * model.d_model * plan.width
    block = 16 * unit + tokens * (2 * mask * model.d_model + 4 * model.n_head + 16)
    inner = model.n_layer * (unit if checkpointing else block)
    kept = inner + 2 * unit + mask * tokens * model.d_model + 4 * tokens * model.vocab_size
    logits = plan.width + (4 if plan.width == 2 else 0)  # and their copy in fp32; backward: two gradients in fp32
    inner += block if checkpointing else 0
    working = 5 * unit  # what a block's own backward pass adds
    held, forward, head, last, first, end, step = fixed(model, plan, ranks), *gradients(model, plan, ranks)
    backward = head + kept + 8 * tokens * model.vocab_size, last + inner + working, first + block + working, end
    forward += kept + logits * tokens * model.vocab_size
    return {"forward": held + forward, "backward": held + max(backward), "step": held + step}


def offloaded(model, plan, ranks):
    """Bytes that a rank keeps in host memory while it trains."""
    share, zero = model.parameters / ranks, plan.zero
    held = plan.width * share if plan.params != "none" else 0
    if plan.optimizer == "cpu":  # Adam's states, fp32 gradients, 16-bit ones; stage 2 stages the largest weight, too
        held += (16 + plan.width) * share + (plan.width * model.largest if plan.stage < 3 else 0)
    if plan.optimizer == "nvme":
        held += plan.width * share + 4 * min(share, zero.sub_group_size) * zero.offload_optimizer.buffer_count
    if plan.params == "nvme":
        held += plan.width * zero.offload_param.buffer_count * zero.offload_param.buffer_size
    return held


def sent(model, plan, ranks):
    """Bytes that a rank sends in an optimizer step: by the paper, and as DeepSpeed 0.19.8 does it. That all-reduces
    gradients at stages 1 and 2 instead of scattering them, unless told otherwise; gathers at stage 3 a second time only
    what has not stayed gathered; and from stage 2 on sends for each micro batch."""
    weights = plan.width * model.parameters * (ranks - 1) / ranks
    times = plan.accumulation if plan.stage >= 2 else 1
    reduce = 2 if plan.zero.use_multi_rank_bucket_allreduce else 1
    again = 1 - stays_gathered(model, plan) / model.parameters
    really = (2, reduce + 1, reduce * times + 1, (2 + again) * times)[plan.stage]
    return (3 if plan.stage == 3 else 2) * weights, really * weights


def verdict(peak, checkpointing, host, gpu, args):
    """fits, checkpointing (fits with --activation_checkpointing), or no with what is too small."""
    room = (gpu - args.reserve_gib) * 2**30
    if args.host_gib and host > args.host_gib * 2**30:
        return "no: host" if checkpointing <= room else "no: GPU, host"
    return "fits" if peak <= room else "checkpointing" if checkpointing <= room else "no: GPU"


def show_plan(args):
    model = Model(args.n_layer, args.n_head, args.d_model, args.block_size, -(-args.vocab_size // 64) * 64)
    rows, plans = [], [read_plan(path, args) for path in args.ds_config or [None, *CONFIGS]]
    for plan in plans:
        states = sum(formula(model.parameters, args.ranks, plan.stage, plan.width).values())
        peaks = [max(moments(model, plan, args.ranks, checkpointing).values()) for checkpointing in (False, True)]
        start = 4 * model.parameters * args.ranks_per_host if plan.stage < 3 else 0  # each rank's model in fp32
        saving = plan.width * model.parameters  # whole weights, which rank 0 takes to the CPU
        sizes = *peaks, max(start, offloaded(model, plan, args.ranks) * args.ranks_per_host + saving)
        verdicts = [verdict(*sizes, gpu, args) for gpu in args.gpus]
        rows.append([plan.name, gib(states), *map(gib, sizes), *verdicts])
    heads = ["stage", "formula", "peak", "checkpointing", "host", *(f"{gpu:g} GiB" for gpu in args.gpus)]
    print(f"{model.parameters:,} parameters, {args.ranks} ranks; {model}\n{common.table(heads, rows)}")
    if args.link_gb_s:
        print(f"\nA step of {args.ranks} ranks, each sending at {args.link_gb_s:g} GB/s:\n")
        rows = []
        for plan in plans:
            paper, really = [size / 1e9 for size in sent(model, plan, args.ranks)]
            rows.append([plan.name, f"{paper:.3f}", f"{really:.3f}", f"{really / args.link_gb_s:.3f}"])
        print(common.table(("stage", "sent by formula, GB", "by DeepSpeed, GB", "sending, s"), rows))


def show_measured(args):
    """Train three steps on the sample text. Raises ToolError with the run's output if it fails."""
    from torch import cuda

    names = "n_layer n_head d_model block_size dropout batch_size gradient_accumulation_steps precision".split()
    flags = {name: getattr(args, name) for name in names}
    flags |= {"ds_config": args.ds_config and args.ds_config[0].resolve()}
    flags |= {"dataset": "sample", "max_steps": 3, "eval_interval": 0}
    with tempfile.TemporaryDirectory() as folder:
        run, result = Path(folder, "run"), Path(folder, "peaks.json")
        words = common.launch_command("scripts/tools/memory_peaks.py", args.ranks)
        words += [str(result), str(ROOT / args.measure), f"--output_dir={run}"]
        words += [f"--{name}={value}" for name, value in flags.items() if value is not None]
        env = common.launch_environment(gpus=cuda.is_available())
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode or not result.exists():
            raise ToolError(f"{args.measure} failed with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
        peaks, ledger = common.read_json(result), common.read_json(run / "summary.json")["ledger"]
        vocab_size = common.read_json(run / "model" / "config.json")["vocab_size"]
        path = run / "ds_config.json"
        plan = read_plan(path if path.exists() else None, args)
    model = Model(args.n_layer, args.n_head, args.d_model, args.block_size, vocab_size)
    device = "GPU" if cuda.is_available() else "CPU"
    moved = offloaded(model, plan, args.ranks) if device == "CPU" else 0  # there all memory is the host's
    print(f"{args.measure}: {model.parameters:,} parameters, {args.ranks} ranks, on {device}\n")
    planned = moments(model, plan, args.ranks)
    rows = [(part, int(size + moved) >> 20, peaks[part] >> 20) for part, size in planned.items()]
    print(common.table(("peak of rank 0, MiB", "planned", "measured"), rows))
    rows = [(kind, row["formula"] >> 20, row["held"] >> 20) for kind, row in ledger.items()]
    print("\n" + common.table(("ledger of rank 0, MiB", "formula", "held"), rows))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--n_layer", type=int, default=6, help="transformer blocks (%(default)s)")
    add("--n_head", type=int, default=12, help="attention heads per block (%(default)s)")
    add("--d_model", type=int, default=768, help="width of the residual stream (%(default)s)")
    add("--vocab_size", type=int, default=50257, help="tokens of the tokenizer (%(default)s, GPT-2's)")
    add("--block_size", type=int, default=256, help="tokens per sequence (%(default)s)")
    add("--dropout", type=float, default=0.1, help="0 saves its masks (%(default)s)")
    add("--batch_size", type=int, help="micro batch: sequences per rank per forward (the JSON's)")
    add("--gradient_accumulation_steps", type=int, help="micro batches per optimizer step (the JSON's)")
    add("--precision", choices=list(WIDTH), help="of weights and activations (the JSON's)")
    add("--ds_config", type=Path, nargs="+", metavar="FILE", help="JSONs (those of configs/, and no ZeRO at all)")
    add("--ranks", type=int, default=1, help="GPUs of all hosts together (%(default)s)")
    add("--ranks_per_host", type=int, default=8, help="the most on one host (%(default)s)")
    add("--gpus", type=float, nargs="+", default=[24.0], metavar="GIB", help="GiB of each kind of GPU (24)")
    add("--host_gib", type=float, metavar="GIB", help="GiB of the smallest host; left out: not judged")
    add("--reserve_gib", type=float, default=2.0, help="kept free on each GPU: an assumption (%(default)s)")
    add("--link_gb_s", type=float, help="10**9 bytes a second that a rank can send: says what a step sends, too")
    add("--measure", choices=common.SCRIPTS, metavar="SCRIPT.py", help="train with it instead, and print what was held")
    args = parser.parse_args()
    for name, value in [*vars(args).items(), ("gpus", min(args.gpus))]:
        if type(value) in (int, float) and not (value > 0 or value == 0 and name in ("dropout", "reserve_gib")):
            parser.error(f"--{name} {value} must be above 0")
    if args.measure and len(args.ds_config or []) > 1:
        parser.error("--measure takes one --ds_config")
    args.ranks_per_host = min(args.ranks_per_host, args.ranks)
    if args.d_model % args.n_head:
        parser.error(f"--d_model {args.d_model} is not a multiple of --n_head {args.n_head}")
    return args


def main():
    args = parse_args()
    common.cpu_default()
    try:
        if args.measure:
            show_measured(args)
        else:
            show_plan(args)
    except ToolError as error:
        common.exit_with(error)


if __name__ == "__main__":
    main()
