"""This GPT under Lightning, on a JSON of configs/ with two changes that Lightning asks for.

Accumulation moves from the JSON to Lightning's Trainer, and the schedule into the JSON, beside the optimizer.

Run:
    torchrun --nproc_per_node 2 examples/with_lightning.py --dataset sample --n_layer 2 --max_steps 10
"""

import argparse

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from shared import RANK, RANKS, RANKS_HERE, prepare, start
from torch.utils.data import DataLoader, DistributedSampler


class CPUStrategy(DeepSpeedStrategy):  # only without its checks for a GPU, which DeepSpeed itself does not need
    root_device = torch.device("cpu", 0)

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Lesson(LightningModule):
    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def on_train_start(self) -> None:
        self.lr_schedulers().step()  # DeepSpeed's stands before the first step, at a learning rate of 0

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = self.model(*batch)
        self.print(f"step={self.global_step + 1} loss={self.trainer.strategy.reduce(loss.detach().clone()):.4f}")
        return loss

    def configure_optimizers(self) -> None:
        """Has to be there; not called, since the JSON has the optimizer."""


def main(args: argparse.Namespace, config: dict) -> None:
    model, data = prepare(args, config)
    trainer = {"devices": RANKS_HERE, "accumulate_grad_batches": config.pop("gradient_accumulation_steps")}
    trainer |= dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    rates = {"total_num_steps": args.max_steps, "warmup_num_steps": args.warmup_steps - 1, "warmup_type": "linear"}
    rates |= {"warmup_min_ratio": 1 / args.warmup_steps, "cos_min_ratio": 0.1}  # the scripts' warm-up and decay
    config["scheduler"] = {"type": "WarmupCosineLR", "params": rates}
    strategy = (DeepSpeedStrategy if torch.cuda.is_available() else CPUStrategy)(config=config)
    order = DistributedSampler(data, RANKS, RANK, shuffle=False)  # Lightning's own would shuffle
    loader = DataLoader(data, config["train_micro_batch_size_per_gpu"], sampler=order)
    Trainer(strategy=strategy, max_steps=args.max_steps, **trainer).fit(Lesson(model), loader)


if __name__ == "__main__":
    start(main, __doc__)
