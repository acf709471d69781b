"""This GPT under Accelerate, on a JSON of configs/.

Accelerate keeps the loop in your hands. The optimizer comes from the JSON, so the script passes a DummyOptim, which
holds only the parameter groups; a DummyScheduler likewise holds the scripts' warm-up and decay.

Run:
    torchrun --nproc_per_node 2 examples/with_accelerate.py --dataset sample --n_layer 2 --max_steps 10
"""

import argparse

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler
from shared import base, prepare, schedule, start


def main(args: argparse.Namespace, config: dict) -> None:
    if not torch.cuda.is_available():
        PartialState(cpu=True)  # else each rank takes itself for the only one; Accelerator(cpu=True) drops DeepSpeed
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model, data = prepare(args, config)
    adam = config["optimizer"]["params"]
    optimizer = DummyOptim(base.parameter_groups(model), lr=adam["lr"], weight_decay=adam["weight_decay"])
    scheduler = DummyScheduler(optimizer, lr_scheduler_callable=schedule(args))
    loader = torch.utils.data.DataLoader(data, batch_size=config["train_micro_batch_size_per_gpu"])
    engine, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    step, losses = 0, []
    for inputs, targets in loader:
        with accelerator.accumulate(engine):
            losses.append(engine(inputs, targets))
            accelerator.backward(losses[-1])  # and the engine's step; the next three do nothing under DeepSpeed
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            loss = accelerator.reduce(torch.stack(losses).mean().detach(), "mean")
            accelerator.print(f"step={step} loss={loss:.4f}")
            losses.clear()
    accelerator.end_training()


if __name__ == "__main__":
    start(main, __doc__)
