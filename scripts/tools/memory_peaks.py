"""Runs a script and writes what its tensors took at most in each part of a step, for plan_memory.py --measure.

PyTorch's hooks say where a part begins. On a GPU its allocator counts, on a CPU the profiler does. RESULT.json has the
bytes of rank 0 in its last micro batch and step, by "forward", "backward" and "step".
"""

import gc
import json
import os
import runpy
import sys
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity

PARTS = ("forward", "backward", "step")


def live_bytes():
    """Of all floating-point tensors of this process."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    memory = [tensor.untyped_storage() for tensor in tensors if tensor.is_floating_point() and not tensor.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in memory}.values())


class Peaks:
    """sizes: the most bytes that this rank's tensors took in each part of its last micro batch and step."""

    def __init__(self, result):
        self.result, self.sizes, self.part, self.profile = result, {}, "start", None

    def begin(self, part):
        if self.part == "end":
            return
        if torch.cuda.is_available():
            self.sizes[self.part] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        elif part == "end":
            self.read_profile()
        elif part == "forward":
            if self.profile:
                self.profile.stop()
            self.start = live_bytes()
            self.profile = torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.start()
        with torch.profiler.record_function(part):
            self.part = part
        if part == "end" and os.environ.get("RANK", "0") == "0":
            Path(self.result).write_text(json.dumps(self.sizes))

    def read_profile(self):
        self.profile.stop()
        held, part, self.sizes = self.start, "forward", {}
        for event in sorted(self.profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            part = event.name() if event.name() in PARTS else part
            held += event.nbytes() if event.name() == "[memory]" else 0
            self.sizes[part] = max(self.sizes.get(part, 0), held)


def main(result, script, *flags):
    peaks = Peaks(result)

    def begin(module, part):
        if type(module).__name__ == "GPTLike":
            peaks.begin(part if module.training else "end")

    register_module_forward_pre_hook(lambda module, inputs: begin(module, "forward"))
    register_module_forward_hook(lambda module, inputs, outputs: begin(module, "backward"))
    register_optimizer_step_pre_hook(lambda *_: peaks.begin("step"))
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
