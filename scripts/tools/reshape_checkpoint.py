"""Move a run of a ZeRO script to another number of ranks, or to another stage, so that it goes on where it was.

    python scripts/tools/reshape_checkpoint.py runs/DeepSpeed-GPTLike-ZeRO-2 --world_size 4
    python scripts/tools/reshape_checkpoint.py runs/DeepSpeed-GPTLike-ZeRO-2 --world_size 2 --stage 3 --output runs/new

writes a new folder, RUN-4ranks or --output, with one checkpoint in DeepSpeed's own format for so many ranks, and prints
the command that continues it. RUN stays as it is. The global batch (micro batch x accumulation x ranks) stays too, as
the data of a step depend on it: the next loss is what it would have been in RUN. (Dropout draws by rank: above 0 the
losses differ as between two seeds.) A Multihosts run continues with that script in ZeRO-2's place.

DeepSpeed's ds_to_universal makes a file of each parameter's weight, momentum and variance; as many CPU processes as the
new run has ranks put them into engines of the new shape, save, and load again. What was saved is converted once more,
and has to be equal bit for bit before the folder gets its name. (DeepSpeed's own way back, load_universal, does not go
from stage 2 to 3 or back, and at stage 3 gives biases and norms the weight decay of matrices.) Memory: 16 bytes a
parameter for all ranks together, and at stages 1 and 2 a whole model more for each. Disk: four times the checkpoint.

Reshape no checkpoint of a stranger: DeepSpeed unpickles it, and a pickle can run any code.
Exit code 0: reshaped, 1: it cannot be, nothing is written, 2: wrong usage.

Source: https://www.deepspeed.ai/tutorials/universal-checkpointing/
"""

import argparse
import fcntl
import gc
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import torch
from common import ROOT, load_script, right_script

STATES = ("fp32", "exp_avg", "exp_avg_sq")  # a parameter's files in a universal checkpoint
PLAN = "RESHAPE_PLAN"  # environment: the folder of the work that a new rank takes part in
NOT_FLAGS = {"output_dir", "resume", "overwrite", "local_rank", "epochs", "max_steps", "batch_size"}
NOT_FLAGS |= {"gradient_accumulation_steps"}  # not taken over as they are


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="--output_dir of a run of a ZeRO script")
    parser.add_argument("--world_size", type=int, required=True, help="ranks that are to continue the run")
    parser.add_argument("--stage", type=int, choices=[1, 2, 3], help="ZeRO stage to go on at; left out: as it is")
    parser.add_argument("--step", type=int, help="checkpoint to take; left out: the newest one")
    parser.add_argument("--batch_size", type=int, help="new micro batch; left out: the old one or the next smaller")
    parser.add_argument("--output", type=Path, help="folder to write; left out: RUN-<N>ranks, beside RUN")
    return parser


def divide(global_batch: int, ranks: int, micro_batch: int, wanted: int | None) -> tuple[int, int]:
    """(micro batch, accumulation) that give the global batch on so many ranks. Without a wanted micro batch it is the
    largest one that needs no more memory than the old one. Raises ValueError where it does not divide."""
    if global_batch % ranks:
        fitting = " ".join(str(n) for n in range(1, global_batch + 1) if global_batch % n == 0)
        raise ValueError(f"the global batch of {global_batch} sequences does not divide among {ranks} ranks: "
                         f"--world_size may be one of {fitting}")  # fmt: skip
    share = global_batch // ranks
    fitting = [size for size in range(1, share + 1) if share % size == 0]
    if wanted and wanted not in fitting:
        raise ValueError(f"--batch_size {wanted} does not divide the {share} sequences that each rank has in a step: "
                         f"it may be one of {' '.join(map(str, fitting))}")  # fmt: skip
    micro = wanted or max(size for size in fitting if size <= micro_batch)
    return micro, share // micro


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}. RUN has to be the --output_dir of a ZeRO script") from error


def lock(run: Path) -> BinaryIO | None:
    """Keep training processes out of RUN until the file is closed. Raises ValueError where one is in."""
    if not (run / ".lock").exists():
        return None
    try:
        fcntl.lockf(file := (run / ".lock").open("rb"), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"a training process is writing to {run}: stop it first, it saves before it ends") from error
    return file


def find_checkpoint(run: Path, step: int | None) -> tuple[Path, dict]:
    """A whole checkpoint and its mark. Raises ValueError naming what is missing."""
    marks = {}
    for path in sorted((run / "checkpoints").glob("step*/rank*.json")):
        marks[int(path.parent.name[4:])] = read_json(path)
    wanted = max(marks, default=None) if step is None else step
    if wanted not in marks:
        held = " ".join(map(str, sorted(marks))) or "none"
        raise ValueError(
            f"{run} has no checkpoint of a ZeRO script{f' of step {step}' if step else ''}; there are: {held}"
        )
    folder, settings = run / "checkpoints" / f"step{wanted}", marks[wanted]["settings"]
    ranks = range(settings["world_size"])
    absent = [str(r) for r in ranks if not any(folder.glob(f"*zero_pp_rank_{r}_mp_rank_00_optim_states.pt"))]
    if absent:
        raise ValueError(f"{folder} has no files of rank {' '.join(absent)}: copy them here from the other hosts")
    return folder, marks[wanted]


def new_config(run: Path, settings: dict, stage: int) -> dict:
    """DeepSpeed's JSON for the new run, but for the batch. Raises ValueError for what no CPU engine can hold."""
    config = read_json(run / "ds_config.json")
    zero, old = config.get("zero_optimization", {}), settings["zero_stage"]
    if zero.get("stage") != old:
        raise ValueError(f"{run}/ds_config.json has stage {zero.get('stage')}, the checkpoint {old}: another run was "
                         "tried here since. Start the run's own command once more, and stop it")  # fmt: skip
    if "nvme" in [(zero.get(f"offload_{what}") or {}).get("device") for what in ("optimizer", "param")]:
        raise ValueError(f"{run} keeps its states on NVMe, where DeepSpeed's ds_to_universal does not find them: only "
                         "the weights in its model/ can be taken elsewhere")  # fmt: skip
    if settings["precision"] == "fp16":
        raise ValueError(f"{run} is in fp16, which does not run on a CPU, where checkpoints are reshaped")
    for key in ("train_batch_size", "checkpoint"):  # the latter: split disks. Both follow from the new run
        config.pop(key, None)
    if stage != old:
        config["zero_optimization"] = read_json(ROOT / "configs" / f"zero{stage}.json")["zero_optimization"]
    return config


def universal(checkpoint: Path, target: Path) -> Path:
    """Run DeepSpeed's converter. Raises ValueError with its last words."""
    words = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(checkpoint)]
    words += ["--output_folder", str(target), "--num_extract_workers", "2", "--num_merge_workers", "2"]
    run_or_raise(words, f"DeepSpeed's ds_to_universal on {checkpoint}")
    return target


def run_or_raise(words: list[str], what: str, **env: str) -> None:
    """Run a process with all GPUs hidden, and end it when this one ends. Raises ValueError with the reason it gave."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} | env
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate()
        finally:
            process.terminate()  # torchrun ends its ranks
    if process.returncode:
        said = re.findall(r"^(?:\[rank\d+\]: ?)?(?:reshape_checkpoint.py: error: |[\w.]*Error: )(.+)", output, re.M)
        said += re.findall(r"Signal \d+ \(SIG\w+\) received", output)  # SIGKILL: the memory is used up
        raise ValueError(f"{what} failed: {said[0] if said else output[-1000:]}")


def read_tensor(folder: Path, name: str, state: str) -> torch.Tensor:
    """A flat tensor of a universal checkpoint."""
    found = torch.load(folder / "zero" / name / f"{state}.pt", weights_only=True, mmap=True)
    return (found["param"] if isinstance(found, dict) else found).flatten()  # a dict at stages 1 and 2


def common_state(checkpoint: Path) -> dict:
    """What a checkpoint holds once: Adam's step and settings, the scheduler, DeepSpeed's counters."""

    def load(pattern: str) -> dict:
        return torch.load(min(checkpoint.glob(pattern)), map_location="cpu", mmap=True, weights_only=False)

    model = load("*mp_rank_00_model_states.pt")
    shard = load("*zero_pp_rank_0_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
    adam = shard["base_optimizer_state" if "base_optimizer_state" in shard else "optimizer_state_dict"]
    groups = [{name: value for name, value in group.items() if name != "params"} for group in adam["param_groups"]]
    counters = {name: model[name] for name in ("global_steps", "global_samples", "skipped_steps")}
    return {"step": int(adam["state"][0]["step"]), "groups": groups, "scheduler": model["lr_scheduler"]} | counters


def fill(engine, states: Path, common: dict) -> None:
    """Put the states into the engine of a new rank. All ranks call this together."""
    from deepspeed import utils, zero

    token = torch.zeros((1, 1), dtype=torch.long)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(token, token))
        engine.step()  # whatever it does is overwritten below; but Adam makes its states in its first step
    zero_adam = engine.optimizer
    if hasattr(zero_adam, "bit16_groups"):  # stages 1 and 2: DeepSpeed has shown the parameters the first group's only
        for group, flat in zip(zero_adam.bit16_groups, zero_adam.single_partition_of_fp32_groups, strict=True):
            utils.lazy_init_hp_params_optimizer_state(group, flat, zero_adam.state)
    for name, parameter in engine.module.named_parameters():
        values = {state: read_tensor(states, name, state) for state in STATES}
        partitioned = hasattr(parameter, "ds_id")
        with zero.GatheredParameters([parameter] if partitioned else [], modifier_rank=0):
            parameter.data.copy_(values["fp32"].view(parameter.shape))
        for state, value in values.items():
            set_weight, set_state = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
            if partitioned:  # DeepSpeed's calls for whole weights fail where the last rank's piece is padded
                size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
                piece = value[rank * size : (rank + 1) * size]
                value = torch.nn.functional.pad(piece, (0, size - len(piece)))
                set_weight, set_state = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
            set_weight(parameter, value) if state == "fp32" else set_state(parameter, value, state)
    for group, saved in zip(engine.basic_optimizer.param_groups, common["groups"], strict=True):
        group.update({name: value for name, value in saved.items() if name in group})  # others: another Adam's
    for state in engine.basic_optimizer.state.values():
        is_tensor = torch.is_tensor(state["step"])
        state["step"] = torch.full_like(state["step"], common["step"]) if is_tensor else common["step"]
    engine.lr_scheduler.load_state_dict(common["scheduler"])
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, common[name])


def work(folder: Path) -> None:
    """What each new rank does: fill an engine, save it, and load what it has saved into another one."""
    plan = read_json(folder / "plan.json")
    script, args = load_script(plan["script"]), argparse.Namespace(**plan["args"])
    try:
        script.start_distributed(args)
        args.output_dir, args.first_of_disk = str(folder / "run"), args.rank == 0
        config = script.load_ds_config(args)
        states = folder / "states"
        rows = len(read_tensor(states, "token_embedding.weight", "fp32")) // args.d_model
        engine = script.build_engine(args, rows, config)
        fill(engine, states, common_state(Path(plan["checkpoint"])))
        script.save_checkpoint(engine, plan["mark"], args)
        if args.rank == 0:
            script.write_json(folder / "run" / "ds_config.json", config)
        engine.destroy()
        del engine
        gc.collect()
        engine = script.build_engine(args, rows, config)
        script.load_checkpoint(engine, args)
        for name, weight in script.full_weights(engine).items():
            if not weight.flatten().equal(read_tensor(states, name, "fp32").to(weight.dtype)):
                raise script.UserError(f"{name} is not the old one when it is loaded again")
        script.gather(None)
        script.dist.destroy_process_group()
    except script.UserError as error:
        sys.exit(f"reshape_checkpoint.py: error: {error}")


def compare(old: Path, new: Path, *common: dict) -> int:
    """How many tensors two universal checkpoints hold. Raises ValueError where they, or what else the checkpoints hold,
    are not the same."""
    for facts in common:  # another Adam has settings of its own besides these
        names = ("lr", "initial_lr", "betas", "eps", "weight_decay")
        facts["groups"] = [[group.get(name) for name in names] for group in facts["groups"]]
    for name, value in common[0].items():
        if value != common[1][name]:
            raise ValueError(f"{name} is {common[1][name]} instead of {value}")
    tensors = [sorted(path.relative_to(folder) for path in folder.glob("zero/*/exp_avg.pt")) for folder in (old, new)]
    if tensors[0] != tensors[1]:
        raise ValueError(f"the parameters differ: {sorted(set(tensors[0]) ^ set(tensors[1]))}")
    for name in (path.parent.name for path in tensors[0]):
        for state in STATES:
            if not read_tensor(old, name, state).equal(read_tensor(new, name, state)):
                raise ValueError(f"{state} of {name} differs from the old one")
    return len(tensors[0]) * len(STATES)


def make_plan(options: argparse.Namespace, target: Path, script: ModuleType) -> dict:
    """All that the new ranks have to know, as JSON."""
    run, stage = options.run, options.stage
    checkpoint, mark = find_checkpoint(run, options.step)
    settings = mark["settings"]
    stage = stage or settings["zero_stage"]
    config = new_config(run, settings, stage)
    micro, accumulation = settings["batch_size"], settings["gradient_accumulation_steps"]
    global_batch = micro * accumulation * settings["world_size"]
    micro, accumulation = divide(global_batch, options.world_size, micro, options.batch_size)
    config |= {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
    args = read_json(run / "args.json") | {name: settings[name] for name in settings if " " not in name}
    args |= {"batch_size": micro, "gradient_accumulation_steps": accumulation, "output_dir": str(target)}
    args |= {"ds_config": str(target / "ds_config.json"), "zero_stage": stage, "overwrite": False, "resume": "auto"}
    now = {"zero_stage": stage, "world_size": options.world_size, "batch_size": micro}
    now |= {"gradient_accumulation_steps": accumulation}
    return {
        "script": right_script(config["zero_optimization"]),
        "args": args | now,
        "config": config,
        "mark": mark | {"settings": settings | now, "ledger": {}},  # of other ranks
        "checkpoint": str(checkpoint.resolve()),
        "name": checkpoint.name,
        "old": settings,
    }


def continue_command(plan: dict, target: Path, ranks: int, script: ModuleType) -> list[str]:
    """The training command for the new run; flags whose default holds are left out."""
    path = ROOT / plan["script"]
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    words = ["torchrun", "--nproc_per_node", str(ranks), str(path), "--ds_config", str(target / "ds_config.json")]
    defaults = vars(script.parse_args([]))
    for name, value in plan["args"].items():
        if name in defaults and name not in NOT_FLAGS and value != defaults[name]:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    for name in ("batch_size", "gradient_accumulation_steps", "max_steps", "output_dir"):
        words += [f"--{name}", str(plan["args"][name])]
    return words


def reshape(options: argparse.Namespace, target: Path, script: ModuleType) -> None:
    """Do it all in a folder beside the target, and rename. Raises ValueError, and leaves nothing, where it fails."""
    plan, ranks = make_plan(options, target, script), options.world_size
    old, args, checkpoint = plan["old"], plan["args"], Path(plan["checkpoint"])
    stage, micro = args["zero_stage"], args["batch_size"]
    if [stage, ranks, micro] == [old[name] for name in ("zero_stage", "world_size", "batch_size")]:
        raise ValueError(f"{options.run} has stage {stage}, {ranks} ranks and a micro batch of {micro} already")
    needed = 4 * sum(path.stat().st_size for path in checkpoint.iterdir())
    if (free := shutil.disk_usage(target.parent).free) < needed:
        raise ValueError(f"it needs about {needed:,} bytes beside {target}, and {free:,} are free")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
        folder = Path(name).resolve()
        (folder / "run" / "checkpoints").mkdir(parents=True)
        script.write_json(folder / "config.json", plan["config"])
        here = {"ds_config": str(folder / "config.json"), "compile": False, "device": "cpu"}
        script.write_json(folder / "plan.json", plan | {"args": args | here})
        print(f"{checkpoint.name} of {options.run}: to {ranks} ranks at stage {stage} ...", file=sys.stderr)
        states = universal(checkpoint, folder / "states")
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]
        words += ["--nproc_per_node", str(ranks), __file__]
        run_or_raise(words, "the launch of the new ranks", **{PLAN: str(folder)})
        new = folder / "run" / "checkpoints" / checkpoint.name
        count = compare(states, universal(new, folder / "again"), common_state(checkpoint), common_state(new))
        lines = (options.run / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= plan["mark"]["step"]]
        (folder / "run" / "metrics.jsonl").write_text("".join(kept))
        script.write_json(folder / "run" / "args.json", args)
        (folder / "run").rename(target)
    if plan["mark"]["step"] >= args["max_steps"]:
        print(f"{options.run} has done all of its {args['max_steps']} steps: give a larger --max_steps")
    print(f"{target}: {count} tensors, weights and Adam's states, are equal bit for bit. Continue with\n"
          f"    {shlex.join(continue_command(plan, target, ranks, script))}")  # fmt: skip


def main() -> None:
    if PLAN in os.environ:
        return work(Path(os.environ[PLAN]))
    parser = build_parser()
    options = parser.parse_args()
    for name in ("world_size", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} {value} must be at least 1")
    stage = f"-zero{options.stage}" if options.stage else ""
    target = options.output or Path(f"{options.run}-{options.world_size}ranks{stage}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # through the cleaning up
    try:
        if not options.run.is_dir():
            raise ValueError(f"{options.run}: no such folder")
        if target.exists():
            raise ValueError(f"{target} exists: choose another --output")
        if not target.parent.is_dir():
            raise ValueError(f"{target.parent}: no such folder")
        held = lock(options.run)  # noqa: F841  as long as this process lives
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        reshape(options, target, load_script("DeepSpeed-GPTLike-ZeRO-2.py"))
    except (OSError, ValueError) as error:
        sys.exit(f"reshape_checkpoint.py: error: {error}")
    except KeyError as error:
        sys.exit(f"reshape_checkpoint.py: error: {options.run} has no {error}: is it a run of these scripts?")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
