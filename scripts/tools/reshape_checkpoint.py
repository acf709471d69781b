"""Move a run of a ZeRO script to another number of ranks, or to another stage, so that it goes on where it was.

    python scripts/tools/reshape_checkpoint.py runs/DeepSpeed-GPTLike-ZeRO-2 --world_size 4
    python scripts/tools/reshape_checkpoint.py runs/DeepSpeed-GPTLike-ZeRO-2 --world_size 2 --stage 3 --output runs/new

writes a new folder with one checkpoint in DeepSpeed's own format for so many ranks, and prints the command that
continues it. RUN stays as it is. The global batch (micro batch x accumulation x ranks) stays too, as the data of a step
depend on it: the next loss is what it would have been in RUN. (Dropout draws by rank.) The micro batch is the old one,
or the next smaller one that divides.

DeepSpeed's ds_to_universal makes a file of each parameter's weight, momentum and variance; as many CPU processes as the
new run has ranks put them into engines of the new shape, and save. What was saved is converted once more, and has to be
equal bit for bit before the folder gets its name. (DeepSpeed's own load_universal does not change the stage.) Memory:
16 bytes a parameter for all ranks, at stages 1 and 2 a whole model more for each. Disk: four times the checkpoint.
Exit code 0: reshaped, 1: it cannot be, nothing is written, 2: wrong usage.
"""

import argparse
import fcntl
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import torch
from common import ROOT, ToolError, exit_with, load_script, read_json

STATES = ("fp32", "exp_avg", "exp_avg_sq")  # a parameter's files in a universal checkpoint
SETTINGS = ("lr", "initial_lr", "betas", "eps", "weight_decay")  # that each kind of Adam has in its groups
COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # of DeepSpeed's engine
PLAN = "RESHAPE_PLAN"  # environment: the folder of the work that a new rank takes part in
NOT_FLAGS = ("resume", "overwrite", "local_rank", "epochs")  # of a run, but not of the one that continues it


def divide(global_batch, ranks, micro_batch):
    """(micro batch, accumulation) that give the global batch on so many ranks, with no more memory than micro_batch."""
    if global_batch % ranks:
        allowed = [number for number in range(1, global_batch + 1) if global_batch % number == 0]
        raise ToolError(f"{global_batch} sequences a step do not divide among {ranks} ranks: take one of {allowed}")
    share = global_batch // ranks
    micro = max(size for size in range(1, micro_batch + 1) if share % size == 0)
    return micro, share // micro


def find_checkpoint(run, step):
    """The folder of a whole checkpoint, and its mark."""
    marks = {path.parent: read_json(path) for path in run.glob("checkpoints/step*/rank*.json")}
    by_step = {mark["step"]: folder for folder, mark in marks.items()}
    step = step or max(by_step, default=None)
    if step not in by_step:
        raise ToolError(f"{run} has no checkpoint of a ZeRO script of step {step}; there are: {sorted(by_step)}")
    folder, mark = by_step[step], marks[by_step[step]]
    ranks = range(mark["settings"]["world_size"])
    absent = [rank for rank in ranks if not any(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))]
    if absent:
        raise ToolError(f"{folder} has no files of ranks {absent}: copy them here from the other hosts")
    return folder, mark


def new_config(run, settings, stage):
    """DeepSpeed's JSON for the new run, but for the batch. Raises ToolError for what no CPU engine can hold."""
    config = read_json(run / "ds_config.json")
    if "nvme" in common.offload_devices(config["zero_optimization"]):
        raise ToolError(f"{run} keeps its states on NVMe, where DeepSpeed's ds_to_universal does not find them")
    if settings["precision"] == "fp16":
        raise ToolError(f"{run} is in fp16, which does not run on a CPU, where checkpoints are reshaped")
    for key in ("train_batch_size", "checkpoint"):  # the latter: split disks. Both follow from the new run
        config.pop(key, None)
    if stage != settings["zero_stage"]:
        config["zero_optimization"] = read_json(ROOT / "configs" / f"zero{stage}.json")["zero_optimization"]
    return config


def universal(checkpoint, target):
    """DeepSpeed's converter."""
    words = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(checkpoint)]
    words += ["--output_folder", str(target), "--num_extract_workers", "2", "--num_merge_workers", "2"]
    run_or_raise(words, f"DeepSpeed's ds_to_universal on {checkpoint}")
    return target


def run_or_raise(words, what, **env):
    """Run a process with all GPUs hidden, and end it when this one ends. Raises ToolError with its last words."""
    env = common.launch_environment(False, **env)
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate()
        finally:
            process.terminate()  # torchrun ends its ranks
    if process.returncode:
        raise ToolError(f"{what} failed: {output[-2000:]}")


def read_tensor(folder, name, state):
    """A flat tensor of a universal checkpoint."""
    found = torch.load(folder / "zero" / name / f"{state}.pt", weights_only=True, mmap=True)
    return (found["param"] if isinstance(found, dict) else found).flatten()  # a dict at stages 1 and 2


def common_state(checkpoint):
    """What a checkpoint holds once: Adam's step and settings, the scheduler, DeepSpeed's counters."""
    load = functools.partial(torch.load, map_location="cpu", mmap=True, weights_only=False)
    model = load(min(checkpoint.glob("*mp_rank_00_model_states.pt")))
    shard = load(min(checkpoint.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt")))["optimizer_state_dict"]
    adam = shard["base_optimizer_state" if "base_optimizer_state" in shard else "optimizer_state_dict"]
    groups = [{name: group[name] for name in SETTINGS if name in group} for group in adam["param_groups"]]
    counters = {name: model[name] for name in COUNTERS}
    return {"step": int(adam["state"][0]["step"]), "groups": groups, "scheduler": model["lr_scheduler"]} | counters


def fill(engine, states, shared):
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
            if state == "fp32":
                set_weight(parameter, value)
            else:
                set_state(parameter, value, state)
    for group, saved in zip(engine.basic_optimizer.param_groups, shared["groups"], strict=True):
        group.update(saved)
    for state in engine.basic_optimizer.state.values():
        is_tensor = torch.is_tensor(state["step"])
        state["step"] = torch.full_like(state["step"], shared["step"]) if is_tensor else shared["step"]
    engine.lr_scheduler.load_state_dict(shared["scheduler"])
    for name in COUNTERS:
        setattr(engine, name, shared[name])


def work(folder):
    """What each new rank does: fill an engine, and save it."""
    plan = read_json(folder / "plan.json")
    script, args = load_script(plan["script"]), argparse.Namespace(**plan["args"])
    script.start_distributed(args)
    args.output_dir, args.first_of_disk = str(folder / "run"), args.rank == 0
    config = script.load_ds_config(args)
    rows = len(read_tensor(folder / "states", "token_embedding.weight", "fp32")) // args.d_model
    engine = script.build_engine(args, rows, config)
    fill(engine, folder / "states", common_state(Path(plan["checkpoint"])))
    script.save_checkpoint(engine, plan["mark"], args)
    if args.rank == 0:
        script.write_json(folder / "run" / "ds_config.json", config)
    script.gather(None)
    script.dist.destroy_process_group()


def compare(old, new):
    """How many tensors two universal checkpoints hold. Raises ToolError where they are not the same."""
    names = [sorted(path.parent.name for path in folder.glob("zero/*/exp_avg.pt")) for folder in (old, new)]
    if names[0] != names[1]:
        raise ToolError(f"the parameters differ: {set(names[0]) ^ set(names[1])}")
    states = [(name, state) for name in names[0] for state in STATES]
    for name, state in states:
        if not read_tensor(old, name, state).equal(read_tensor(new, name, state)):
            raise ToolError(f"{state} of {name} differs from the old one")
    return len(states)


def make_plan(options, target):
    """All that the new ranks have to know, as JSON."""
    checkpoint, mark = find_checkpoint(options.run, options.step)
    old, args = mark["settings"], read_json(options.run / "args.json")
    stage, ranks = options.stage or old["zero_stage"], options.world_size
    if (stage, ranks) == (old["zero_stage"], old["world_size"]):
        raise ToolError(f"{options.run} has stage {stage} and {ranks} ranks already")
    global_batch = old["batch_size"] * old["gradient_accumulation_steps"] * old["world_size"]
    micro, accumulation = divide(global_batch, ranks, old["batch_size"])
    config = new_config(options.run, old, stage)
    config |= {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
    now = {"zero_stage": stage, "world_size": ranks, "batch_size": micro, "gradient_accumulation_steps": accumulation}
    paths = {"output_dir": str(target), "ds_config": str(target / "ds_config.json")}
    return {
        "script": common.right_script(config["zero_optimization"]),
        "args": old | args | now | paths | {"overwrite": False, "resume": "auto"},
        "config": config,
        "mark": mark | {"settings": old | now, "ledger": {}, "best": None},  # the next validation makes model/
        "checkpoint": str(checkpoint.resolve()),
    }


def continue_command(plan):
    """The training command for the new run; flags whose default holds are left out."""
    args = plan["args"]
    words = ["torchrun", "--nproc_per_node", str(args["world_size"]), os.path.relpath(ROOT / plan["script"])]
    for name, default in vars(load_script(plan["script"]).parse_args([])).items():
        if name not in NOT_FLAGS and args[name] != default:
            words += [f"--{name}"] if args[name] is True else [f"--{name}", str(args[name])]
    return words


def reshape(options, target, script):
    """Do it all in a folder beside the target, and rename: where it fails, nothing is left."""
    plan = make_plan(options, target)
    args, checkpoint = plan["args"], Path(plan["checkpoint"])
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
        folder = Path(name).resolve()
        (folder / "run" / "checkpoints").mkdir(parents=True)
        script.write_json(folder / "config.json", plan["config"])
        here = {"ds_config": str(folder / "config.json"), "compile": False, "device": "cpu"}
        script.write_json(folder / "plan.json", plan | {"args": args | here})
        common.warn_pickle(checkpoint)
        print(f"{checkpoint}: to {args['world_size']} ranks at stage {args['zero_stage']} ...", file=sys.stderr)
        states = universal(checkpoint, folder / "states")
        words = common.launch_command("scripts/tools/reshape_checkpoint.py", args["world_size"])
        run_or_raise(words, "the launch of the new ranks", **{PLAN: str(folder)})
        new = folder / "run" / "checkpoints" / checkpoint.name
        if common_state(checkpoint) != common_state(new):
            raise ToolError(f"{common_state(new)} is saved instead of {common_state(checkpoint)}")
        count = compare(states, universal(new, folder / "again"))
        rows = [row for step, row in common.read_metrics(options.run).items() if step <= plan["mark"]["step"]]
        kept = [{name: row[name] for name in row if not name.startswith("validation")} for row in rows]  # as "best"
        (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        script.write_json(folder / "run" / "args.json", args)
        (folder / "run").rename(target)
    if plan["mark"]["step"] >= args["max_steps"]:
        print(f"{options.run} has done all of its {args['max_steps']} steps: give a larger --max_steps")
    print(f"{target}: {count} tensors, weights and Adam's states, are equal bit for bit. Continue with")
    print(f"    {shlex.join(continue_command(plan))}")


def main():
    if PLAN in os.environ:
        return work(Path(os.environ[PLAN]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="--output_dir of a run of a ZeRO script")
    parser.add_argument("--world_size", type=int, required=True, help="ranks that are to continue the run")
    parser.add_argument("--stage", type=int, choices=[1, 2, 3], help="ZeRO stage to go on at; left out: as it is")
    parser.add_argument("--step", type=int, help="checkpoint to take; left out: the newest one")
    parser.add_argument("--output", type=Path, help="folder to write; left out: RUN-<N>ranks, beside RUN")
    options = parser.parse_args()
    if options.world_size < 1:
        parser.error("--world_size must be at least 1")
    stage = f"-zero{options.stage}" if options.stage else ""
    target = options.output or Path(f"{options.run}-{options.world_size}ranks{stage}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # through the cleaning up
    try:
        if target.exists():
            raise ToolError(f"{target} exists: choose another --output")
        lock = os.open(options.run / ".lock", os.O_CREAT | os.O_RDWR)  # stays open, and keeps training processes out
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        reshape(options, target, load_script("DeepSpeed-GPTLike-ZeRO-2.py"))
    except BlockingIOError:
        exit_with(f"a training process is writing to {options.run}: stop it first, it saves before it ends")
    except (OSError, ToolError) as error:
        exit_with(error)
    except KeyError as error:
        exit_with(f"{options.run} has no {error}: is it a run of these scripts?")


if __name__ == "__main__":
    main()
