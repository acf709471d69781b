"""Where the time of an optimizer step goes: one of the six scripts under torch.profiler, on the CPU.

    python scripts/profile_step.py GPTLike-Base.py --dataset sample --n_head 6 --d_model 384 --max_steps 10
    torchrun --nproc_per_node 2 scripts/profile_step.py DeepSpeed-GPTLike-ZeRO-2.py --dataset sample --max_steps 10
    torchrun --nproc_per_node 2 scripts/profile_step.py scripts/rivals.py ddp --dataset sample --max_steps 10

The flags are the script's own, and it runs as ever; so does a rival that trains in the scripts' loop. The steps but the
first five and the last are profiled. Rank 0 prints, and writes to OUTPUT_DIR/profile.md, the milliseconds a step that
each kind of operation takes by itself, and the longest operations. What no operation of PyTorch accounts for is Python,
and waiting for the other ranks. Exit codes are the script's; 1 where it has too few steps, 2 without a script.
"""

import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import rivals
import torch

SKIPPED = 4  # first steps: caches fill, and the second counts its memory
KINDS = {  # kind: names of operations, the first that fits
    "matmul": r"aten::(mm|addmm|bmm|baddbmm|_mkldnn|mkldnn_linear|mv|dot)\b|mkldnn",
    "attention": r"scaled_dot_product|_flash_attention",
    "dropout": r"dropout|bernoulli",
    "cross-entropy": r"softmax|nll_loss|cross_entropy",
    "GELU": r"gelu",
    "layer norm": r"layer_norm",
    "embedding": r"embedding|index_put|index_select",
    "optimizer": r"_fused_adam|_foreach_|lerp|addcdiv|addcmul",
    "communication": r"allreduce|all_reduce|gloo|c10d|broadcast|_allgather|reduce_scatter|shm",
    "casts and copies": r"copy_|aten::(to|_to_copy|cat|clone|contiguous|fill_|zero_|zeros|empty|resize_|narrow)\b",
    "arithmetic": r"aten::(add|add_|mul|mul_|div|div_|sub|sum|mean|norm|linalg_vector_norm|sqrt|pow)\b",
}


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other operations")


def by_kind(events: Iterable[tuple[str, float]], step_ms: float) -> dict[str, float]:
    """Milliseconds by kind, the longest first, and what of the step no operation accounts for. events: name, own ms."""
    found = {}
    for name, spent in events:
        found[kind_of(name)] = found.get(kind_of(name), 0.0) + spent
    found["outside of operations"] = max(0.0, step_ms - sum(found.values()))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def report(events: list[tuple[str, float]], step_ms: float, title: str) -> str:
    text = f"{title}: {step_ms:.1f} ms a step\n\n| kind | ms | share |\n|---|--:|--:|\n"
    text += "".join(f"| {kind} | {ms:.1f} | {ms / step_ms:.1%} |\n" for kind, ms in by_kind(events, step_ms).items())
    text += "\n| operation | ms by itself | share |\n|---|--:|--:|\n"
    longest = sorted(events, key=lambda event: -event[1])[:15]
    return text + "".join(f"| `{name}` | {ms:.1f} | {ms / step_ms:.1%} |\n" for name, ms in longest)


def run_profiled(script: ModuleType, title: str) -> None:
    """The script's main() with a profiler around its steps."""
    loop = getattr(script, "base", script)  # rivals.py has Base's
    ready = torch.profiler.schedule(skip_first=SKIPPED, wait=0, warmup=1, active=10_000)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], schedule=ready, acc_events=True)
    micro_batches, starts = loop.micro_batches, []

    def marked(data, step: int, args, device):  # called once, at the start of a step
        starts.append(time.perf_counter())
        profiler.step() if len(starts) > 1 else profiler.start()
        if step == args.max_steps - 1:  # which also saves
            finish(args)
        return micro_batches(data, step, args, device)

    def finish(args) -> None:
        profiler.stop()
        if (steps := len(starts) - SKIPPED - 2) < 1:
            raise loop.UserError(f"--max_steps {args.max_steps}: to profile a step, at least {SKIPPED + 3} are needed")
        if loop.rank() == 0:
            spent = [(event.key, event.self_cpu_time_total / 1e3 / steps) for event in profiler.key_averages()]
            operations = [(name, ms) for name, ms in spent if not name.startswith("ProfilerStep")]
            text = report(operations, (starts[-1] - starts[SKIPPED + 1]) * 1e3 / steps, title)
            Path(args.output_dir, "profile.md").write_text(text, encoding="utf-8")
            loop.log(text)

    loop.micro_batches = marked
    loop.stop_on_user_error(script.main)


def main() -> None:
    names = sorted(path.name for path in rivals.ROOT.glob("*GPTLike*.py"))
    name, elsewhere = Path((sys.argv + [""])[1]).name, {"trainer", "link"}.intersection(sys.argv)  # not in Base's loop
    if name not in names and (name != "rivals.py" or elsewhere):
        names.append("scripts/rivals.py with ddp, nanogpt or original")
        sys.stderr.write(f"usage: profile_step.py SCRIPT [FLAGS]; SCRIPT is one of {' '.join(names)}\n")
        sys.exit(2)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    del sys.argv[0]
    run_profiled(rivals if name == "rivals.py" else rivals.load_script(name), " ".join(sys.argv))


if __name__ == "__main__":
    main()
