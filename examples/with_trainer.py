"""This GPT under transformers' Trainer, on a JSON of configs/.

Trainer brings its own loop and wants the JSON's numbers a second time, in its own arguments: it stops where the two
differ. The model is transformers' GPT-2, which has the same shape, from the scripts' initial weights.

Run:
    torchrun --nproc_per_node 2 examples/with_trainer.py --dataset sample --n_layer 2 --max_steps 10
"""

import argparse

import torch
from shared import prepare, start, to_gpt2
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments


def as_gpt2(model: torch.nn.Module, args: argparse.Namespace) -> GPT2LMHeadModel:
    shape = {name: getattr(args, name) for name in ("n_layer", "n_head")}
    shape |= {"n_embd": args.d_model, "n_positions": args.block_size, "vocab_size": len(model.token_embedding.weight)}
    dropout = {"embd_pdrop": args.dropout, "resid_pdrop": args.dropout, "attn_pdrop": 0.0}  # the scripts' attention
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape, **dropout))
    gpt2.load_state_dict(to_gpt2(model.state_dict()))
    return gpt2


def collate(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    inputs, targets = map(torch.stack, zip(*samples, strict=True))  # each (batch, seq)
    return {"input_ids": inputs, "labels": inputs, "shift_labels": targets}  # else the last target would be lost


def main(args: argparse.Namespace, config: dict) -> None:
    model, data = prepare(args, config)
    adam = config["optimizer"]["params"]
    arguments = TrainingArguments(
        output_dir="runs/with_trainer", deepspeed=config, max_steps=args.max_steps, seed=args.seed,
        per_device_train_batch_size=config["train_micro_batch_size_per_gpu"],
        gradient_accumulation_steps=config["gradient_accumulation_steps"],
        learning_rate=adam["lr"], adam_beta1=adam["betas"][0], adam_beta2=adam["betas"][1], adam_epsilon=adam["eps"],
        weight_decay=adam["weight_decay"], max_grad_norm=config["gradient_clipping"], bf16=config["bf16"]["enabled"],
        lr_scheduler_type="cosine_warmup_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=args.warmup_steps, train_sampling_strategy="sequential", remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(), logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(as_gpt2(model, args), arguments, train_dataset=data, data_collator=collate)
    trainer.train()
    for line in trainer.state.log_history:
        if trainer.is_world_process_zero() and "loss" in line:
            print(f"step={line['step']} loss={line['loss']:.4f}")


if __name__ == "__main__":
    start(main, __doc__)
