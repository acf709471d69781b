"""What a DeepSpeed JSON would do in one of the ZeRO scripts, said before any GPU is taken.

    python scripts/lint_config.py configs/zero2.json --world_size 8
    python scripts/lint_config.py my.json --script DeepSpeed-GPTLike-Multihosts.py --batch_size 4 --n_layer 12
    python scripts/lint_config.py configs/*.json --json

Takes the flags of a training command as they are, since they win over the JSON. One verdict a line: ok|warn|FAIL  key
found  wanted. A FAIL is what the script itself would stop with, in its words: its own functions are asked. A warn is
what it says nothing about: keys that do nothing at this stage or in these scripts, buckets larger than the model, who
wins between flag and JSON, batches that fit one number of ranks only. Without --script, the script is the one that the
JSON is for. NVMe folders and GPUs are looked for on this host; --device speaks of another one.
Exit code 0: trains, warn allowed; 1: a FAIL; 2: wrong usage.

Source: deepspeed 0.19.8, runtime/engine.py, _configure_zero_optimizer; https://www.deepspeed.ai/docs/config-json/
"""

import argparse
import copy
import difflib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [f"DeepSpeed-GPTLike-{name}.py" for name in ("ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-Offload", "Multihosts")]
OWN_FLAGS = ("files", "script", "world_size", "device", "parameters", "vocab_size", "json")
BY_FLAG = {  # key of the JSON: flag that wins over it
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "optimizer.params.lr": "lr",
    "optimizer.params.weight_decay": "weight_decay",
    "precision": "precision",
}
# zero_optimization's keys by the optimizer class that reads them; stage3_ is left off.
STAGE_3_KEYS = """offload_param cpu_offload_param sub_group_size prefetch_bucket_size param_persistence_threshold
    model_persistence_threshold max_live_parameters max_reuse_distance gather_16bit_weights_on_model_save
    gather_fp16_weights_on_model_save module_granularity_threshold use_all_reduce_for_fetch_params allgather_sequential
    zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients
    memory_efficient_linear override_module_apply log_trace_cache_warnings enable_sanity_checks leaf_module
    save_muon_momentum_buffer_in_memory""".split()
STAGE_1_2_KEYS = """allgather_bucket_size use_multi_rank_bucket_allreduce ignore_unused_parameters round_robin_gradients
    parameter_alignment elastic_checkpoint""".split()
REDUCTION_KEYS = """reduce_bucket_size reduce_scatter overlap_comm contiguous_gradients round_robin_gradients
    use_multi_rank_bucket_allreduce parameter_alignment""".split()
NVME_KEYS = "nvme_path buffer_count buffer_size max_in_cpu pipeline_read pipeline_write fast_init".split()
NOT_HERE = {  # read by DeepSpeed, but not on the way that the scripts take
    "activation_checkpointing": "--activation_checkpointing: the model recomputes by PyTorch's checkpoint",
    "autotuning": "deepspeed --autotuning",
    "data_efficiency": "DeepSpeed's own data loader",
    "zero_force_ds_cpu_optimizer": "an optimizer that the script builds; these take the JSON's",
}
SILENT = {  # sections in which DeepSpeed ignores a key that it does not know, and the scripts do not look
    "activation_checkpointing": """partition_activations contiguous_memory_optimization cpu_checkpointing profile
        number_checkpoints synchronize_checkpoint_boundary""",
    "aio": "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds",
    "checkpoint": "tag_validation checkpoint_serialization writer load_universal use_node_local_storage parallel_write",
    "data_types": "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules",
    "flops_profiler": "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
    "torch_autocast": "enabled dtype lower_precision_safe_modules",
}
DEPRECATED = {
    "cpu_offload": '"offload_optimizer": {"device": "cpu"}, which is for DeepSpeed-GPTLike-ZeRO-Offload.py',
    "cpu_offload_param": '"offload_param": {"device": "cpu"}, which is for DeepSpeed-GPTLike-ZeRO-Offload.py',
    "stage3_gather_fp16_weights_on_model_save": '"stage3_gather_16bit_weights_on_model_save"',
}


class Check(NamedTuple):
    verdict: str  # ok, warn or FAIL
    key: str
    found: str
    wanted: str


class Model(NamedTuple):
    parameters: int
    largest: int | None  # elements of its largest parameter, where the shape is known


def load_script(name: str) -> ModuleType:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found no GPU
    spec = importlib.util.spec_from_file_location("zero_script", ROOT / name)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.deepspeed.utils.logger.setLevel("ERROR")  # its remarks are rows here
    script.log = lambda message: None
    return script


def build_parser(script: ModuleType) -> argparse.ArgumentParser:
    """The scripts' own flags, and the linter's."""
    parser = script.build_parser()
    parser.description = __doc__.splitlines()[0]
    add = parser.add_argument_group("linter").add_argument
    add("files", metavar="FILE", nargs="+", help="JSON for --ds_config")
    add("--script", type=lambda path: Path(path).name, choices=SCRIPTS, help="left out: the one that the JSON is for")
    add("--world_size", type=int, default=1, help="ranks on all hosts")
    add("--device", choices=["cpu", "cuda"], help="left out: cuda where this host has a GPU")
    add("--parameters", type=float, help="of the model; left out: counted from the shape flags")
    add("--vocab_size", type=int, default=50257, help="tokens, for the same; 50257 is gpt2's")
    add("--json", action="store_true", help="print JSON")
    return parser


# --- what the script would stop with ---


def refusal(text: str, config: dict, place: str = "-") -> Check:
    """A sentence of the script: what is wrong, and after a colon what to write. Its key is the first word that ends one
    of the config's paths, else the place given."""
    text = " ".join(text.split())
    found, *wanted = re.split(r'(?<!"): ', text, maxsplit=1)
    words = re.findall(r"[\w.]*\w", found.removeprefix("unknown key ").partition(" [type=")[0])
    place = next((word for word in words[:1] if "." in word), place)
    paths = (path for word in words for path in leaves(config) if f".{path}".endswith(f".{word}"))
    key = next(paths, place)
    return Check("FAIL", key, text if found == key else found, "" if found == key else "".join(wanted))


def leaves(config: dict, prefix: str = "") -> Iterator[str]:
    """The dotted paths of all keys, a section before what is in it."""
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")


def refusals(script: ModuleType, args: argparse.Namespace, config: dict, host: argparse.Namespace) -> list[Check]:
    """What load_ds_config() of the script would say, asked of the same functions in the same order. Where it would say
    nothing, config and args then hold what the run uses."""
    checks = [refusal(text, config) for text in script.key_problems(config)]
    if not any(check.found.endswith("is not an object") for check in checks):
        checks += [refusal(text, config, "zero_optimization") for text in script.stage_problems(config)]
    if checks:
        return checks
    script.world_size = lambda: host.world_size
    script.take_flags(args, config)
    device = torch.device(host.device)
    if host.device == "cuda" and not torch.cuda.is_available():
        device = torch.device("meta")  # neither: nothing is known about that GPU
    # DeepSpeed's batch arithmetic asks the process group, and there is none.
    ranks = mock.patch.multiple("deepspeed.comm", get_rank=lambda: 0, get_world_size=lambda: host.world_size)
    with ranks:
        return [refusal(text, config) for text in script.value_problems(args, config, device)]


# --- what it says nothing about ---


def section(config: dict, path: str) -> dict:
    """What lies under a dotted path, {} where that is no object."""
    for key in filter(None, path.split(".")):
        config = config.get(key)
        if not isinstance(config, dict):
            return {}
    return config


def rules(config: dict) -> Iterator[tuple[str, list[str], str]]:
    """(section, keys that nothing reads in it, what they are for): at this stage, with these settings, or ever in these
    scripts."""
    root, zero = "zero_optimization", section(config, "zero_optimization")
    stage, summed = zero["stage"], section(config, "data_types").get("grad_accum_dtype")
    devices = {name: section(zero, name).get("device", "none") for name in ("offload_optimizer", "offload_param")}
    for name, use in NOT_HERE.items():
        yield "", [name], use
    yield root, ["allgather_partitions", "cpu_offload_use_pin_memory"], "nothing: this version reads it nowhere"
    yield root, *((STAGE_3_KEYS, "stage 3") if stage < 3 else (STAGE_1_2_KEYS, "stages 1 and 2"))
    if devices["offload_optimizer"] == "none":
        yield root, ["ignore_unused_parameters"], "offload_optimizer"
    if alone_at_stage_1(config) and summed == "fp32":
        yield root, REDUCTION_KEYS, "gradients summed in bf16: in fp32, BF16_Optimizer reduces its own way"
    else:
        yield "bf16", ["immediate_grad_update"], "stage 1 with data_types.grad_accum_dtype fp32"
    for name in ("bf16", "fp16"):
        if not section(config, name).get("enabled"):
            yield name, list(section(config, name)), f"{name}.enabled true"
    for name, device in devices.items():
        if device == "none":
            yield f"{root}.{name}", list(section(zero, name)), "device cpu or nvme"
        if device != "nvme":
            yield f"{root}.{name}", NVME_KEYS, "device nvme"
    if "nvme" not in devices.values():
        yield "", ["aio"], "device nvme"
    if stage < 3:
        yield f"{root}.offload_optimizer", ["super_offload"], "stage 3"
    if not section(zero, "offload_optimizer").get("super_offload"):
        yield f"{root}.offload_optimizer", ["cpuadam_cores_perc"], "super_offload true"


def known_keys(deepspeed: ModuleType) -> dict[str, list[str]]:
    """The keys of the sections that the scripts leave to DeepSpeed."""
    monitors = deepspeed.monitor.config
    models = {"tensorboard": monitors.TensorBoardConfig, "wandb": monitors.WandbConfig, "comet": monitors.CometConfig,
              "csv_monitor": monitors.CSVConfig, "comms_logger": deepspeed.comm.config.CommsLoggerConfig,
              "compile": deepspeed.compile.config.CompileConfig}  # fmt: skip
    return {name: keys.split() for name, keys in SILENT.items()} | {k: list(m.model_fields) for k, m in models.items()}


def unknown_keys(config: dict, deepspeed: ModuleType) -> Iterator[Check]:
    for place, known in known_keys(deepspeed).items():
        for key in section(config, place):
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                wanted = f"did you mean {near[0]}?" if near else f"one of {' '.join(known)}"
                yield Check("warn", f"{place}.{key}", "unknown key", wanted)


def dead_keys(config: dict) -> Iterator[Check]:
    """Keys that are right and do nothing, each once."""
    sections = ("bf16", "fp16", "zero_optimization.offload_optimizer", "zero_optimization.offload_param")
    seen = {f"{name}.{switch}" for name in sections for switch in ("enabled", "device")}
    for place, names, use in rules(config):
        for key in section(config, place):
            path = f"{place}.{key}".lstrip(".")
            if key.removeprefix("stage3_") in names and path not in seen:
                seen.add(path)
                yield Check("warn", path, "does nothing here", f"is for {use}")


def winners(before: dict, flags: argparse.Namespace, args: argparse.Namespace) -> Iterator[Check]:
    """Each setting that a flag and the JSON both know: its value in this run, and whose it is."""
    for key, flag in BY_FLAG.items():
        place, _, name = key.rpartition(".")
        old, value = section(before, place).get(name), getattr(args, flag)
        if flag == "precision":
            old = next((name for name in ("bf16", "fp16") if section(before, name).get("enabled")), None)
        verdict, wanted = "ok", f"--{flag} wins where it is given"
        if hasattr(flags, flag):
            found = f"{value} by --{flag}" + (f", not the JSON's {old}" if old not in (None, value) else "")
        elif old is not None:
            found = f"{value} by the JSON"
        elif flag == "batch_size" and "train_batch_size" in before:
            found = f"{value}, from train_batch_size"
        else:
            verdict = "warn" if flag in ("batch_size", "lr") else "ok"
            found, wanted = f"{value} by default", f"set in the JSON, or by --{flag}"
        yield Check(verdict, key, found, wanted)


def batch(config: dict, args: argparse.Namespace, ranks: int) -> Iterator[Check]:
    total = args.batch_size * args.gradient_accumulation_steps * ranks
    product = f"micro batch {args.batch_size} x accumulation {args.gradient_accumulation_steps} x {ranks} ranks"
    if "train_batch_size" in config:
        yield Check("warn", "train_batch_size", f"{total}, right for {ranks} ranks only", f"none: it is {product}")
    else:
        yield Check("ok", "train_batch_size", f"{total} sequences a step", product)
    summed = section(config, "data_types").get("grad_accum_dtype") or args.precision
    if alone_at_stage_1(config) and summed == "fp32":
        found = "fp32, for which stage 1 takes BF16_Optimizer: the script cannot read its states and ends at step 2"
        yield Check("warn", "data_types.grad_accum_dtype", found, "bf16, or stage 2")
    elif args.precision == summed == "bf16" and args.gradient_accumulation_steps > 1:
        found = f"{args.gradient_accumulation_steps} micro batches are summed in bf16"
        wanted = "fp32, where memory allows" + ", with stage 2" * alone_at_stage_1(config)
        yield Check("warn", "data_types.grad_accum_dtype", found, wanted)


def alone_at_stage_1(config: dict) -> bool:
    """Stage 1 in bf16 without offload, where DeepSpeed changes its optimizer class for sums in fp32."""
    zero, bf16 = section(config, "zero_optimization"), section(config, "bf16").get("enabled", False)
    return bf16 and zero["stage"] == 1 and section(zero, "offload_optimizer").get("device", "none") == "none"


def optimizer(config: dict) -> Iterator[Check]:
    """The formula that Adam stands for, and what a scheduler takes from the flags."""
    kind, params = config["optimizer"]["type"], config["optimizer"]["params"]
    if kind.lower() == "adam" and params.get("adam_w_mode", True) and params.get("weight_decay"):
        yield Check("warn", "optimizer.type", f"{kind}, which DeepSpeed runs as AdamW",
                    '"AdamW", or "adam_w_mode": false for decay inside the gradient')  # fmt: skip
    if "scheduler" not in config:
        yield Check("ok", "scheduler", "none", "none: the script's warm-up and cosine decay")
        return
    kind, params = config["scheduler"].get("type"), config["scheduler"].get("params", {})
    # These start from a rate of their own; all others multiply the optimizer's.
    own = kind in ("LRRangeTest", "OneCycle", "WarmupDecayLR") or params.get("warmup_max_lr") is not None
    flags = "--lr, --warmup_steps" if own else "--warmup_steps"
    yield Check(
        "warn", "scheduler", f"{kind}, wins over {flags} and the cosine decay", "none, for the script's own schedule"
    )


def buckets(zero: object, model: Model, *, width: int, ranks: int) -> Iterator[Check]:
    """Buffers beside the model whose pieces they move. `zero` is DeepSpeed's own reading of the section, with
    its defaults; `width` the bytes of a number."""
    total, largest, offload, nvme = model.parameters, model.largest, zero.offload_optimizer, zero.offload_param

    def row(name: str, bad: bool, wanted: str, *, fields: object = zero, copies: int = 1) -> Check:
        field = name.rpartition(".")[2].removeprefix("stage3_")
        size, note = getattr(fields, field), "" if field in fields.model_fields_set else ", DeepSpeed's default"
        found = f"{size:,} elements, {size * copies * width / 2**30:.2f} GiB{note}"
        return Check("warn" if bad else "ok", f"zero_optimization.{name}", found, wanted)

    if zero.contiguous_gradients or zero.stage < 3 and offload and offload.device != "none":
        copies = 2 if zero.overlap_comm and zero.stage < 3 else 1
        wanted = f"at most the model's {total:,}: it is allocated whole{', twice with overlap_comm' * (copies - 1)}"
        yield row("reduce_bucket_size", zero.reduce_bucket_size > total, wanted, copies=copies)
    if zero.stage == 3:
        wanted = f"at most the model's {total:,}, or all of it is gathered early"
        yield row("stage3_prefetch_bucket_size", zero.prefetch_bucket_size > total, wanted)
        limit = largest or total
        wanted = f"at most {limit:,}, {'the largest parameter' if largest else 'the model'}, or none is partitioned"
        yield row("stage3_param_persistence_threshold", zero.param_persistence_threshold > limit, wanted)
    if zero.stage == 3 and nvme and nvme.device == "nvme":
        share = -(-largest // ranks) if largest else 0
        wanted = f"{share:,} to {total:,}: a rank's share of any parameter fits, and {nvme.buffer_count} are allocated"
        bad = not share <= nvme.buffer_size <= total
        yield row("offload_param.buffer_size", bad, wanted, fields=nvme, copies=nvme.buffer_count)


def remarks(script: ModuleType, before: dict, config: dict, args: argparse.Namespace, *,
            flags: argparse.Namespace, host: argparse.Namespace) -> Iterator[Check]:  # fmt: skip
    """The rows of a config that the script takes. `before` is the JSON without the flags."""
    zero = script.deepspeed.runtime.zero.config.DeepSpeedZeroConfig(**config["zero_optimization"])
    yield Check("ok", "zero_optimization.stage", str(int(zero.stage)), "as the script's")
    yield from winners(before, flags, args)
    if host.device == "cuda" and args.precision == "bf16" and not torch.cuda.is_available():
        yield Check("warn", "bf16", "no GPU here to ask", "compute capability 8.0 or newer; else --precision fp16")
    yield from batch(config, args, host.world_size)
    yield from optimizer(config)
    width = 4 if args.precision == "fp32" else 2
    yield from buckets(zero, count(script, flags, host), width=width, ranks=host.world_size)


def count(script: ModuleType, flags: argparse.Namespace, host: argparse.Namespace) -> Model:
    if host.parameters:
        return Model(int(host.parameters), None)
    with torch.device("meta"):  # takes no memory
        sizes = [parameter.numel() for parameter in script.GPTLike(flags, host.vocab_size).parameters()]
    return Model(sum(sizes), max(sizes))


def lint(path: str, flags: argparse.Namespace, host: argparse.Namespace) -> tuple[str, list[Check]]:
    """The script that was asked, and all rows of one file."""
    name = host.script or SCRIPTS[0]
    script, args = load_script(name), argparse.Namespace(**vars(flags), ds_config=path)
    try:
        config = script.read_json(path)
    except script.UserError as error:
        return name, [Check("FAIL", "-", " ".join(str(error).split()), "")]
    sound = not any(text.endswith("is not an object") for text in script.key_problems(config))
    if sound and not host.script and script.right_script(config) in SCRIPTS:
        name = script.right_script(config)
        script = load_script(name)
    before = copy.deepcopy(config)
    checks = refusals(script, args, config, host)
    if not checks:
        checks = list(remarks(script, before, config, args, flags=flags, host=host))
    checks += unknown_keys(before, script.deepspeed)
    zero = section(before, "zero_optimization")
    if sound and zero.get("stage") in (1, 2, 3):
        checks += dead_keys(config)
    checks += [
        Check("warn", f"zero_optimization.{key}", "deprecated", DEPRECATED[key]) for key in DEPRECATED if key in zero
    ]
    if '"auto"' in json.dumps(before):
        checks.append(Check("warn", "-", "auto", "numbers: transformers' Trainer fills auto in, these scripts do not"))
    return name, checks


def table(checks: list[Check]) -> str:
    rows = [["".join(c if c.isprintable() else "?" for c in field) or "-" for field in check] for check in checks]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "".join(f"{v:4}  {k:{widths[1]}}  {f:{widths[2]}}  {w}".rstrip() + "\n" for v, k, f, w in rows)


def main() -> None:
    first = load_script(SCRIPTS[0])
    parser = build_parser(first)
    args = parser.parse_args()
    own = {name: vars(args).pop(name) for name in OWN_FLAGS}
    host, files = argparse.Namespace(**own), own["files"]
    for name in ("world_size", "parameters", "vocab_size"):
        if own[name] is not None and not 1 <= own[name] < 2**63:
            parser.error(f"--{name} {own[name]}: must be at least 1")
    first.check_args(parser, args)
    host.device = host.device or ("cuda" if torch.cuda.is_available() else "cpu")
    results = [(path, *lint(path, args, host)) for path in files]
    if host.json:
        facts = {"world_size": host.world_size, "device": host.device}
        print(json.dumps([{"file": path, "script": script} | facts | {"checks": [c._asdict() for c in checks]}
                          for path, script, checks in results], indent=1))  # fmt: skip
    for path, script, checks in [] if host.json else results:
        print(f"{path}: {script}, world size {host.world_size}, {host.device}\n{table(checks)}")
    sys.exit(int(any(check.verdict == "FAIL" for _, _, checks in results for check in checks)))


if __name__ == "__main__":
    main()
