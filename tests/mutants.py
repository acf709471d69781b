"""What scripts/dev/mutate.py breaks, and the tests that must notice."""

from common import SCRIPTS

BASE, ZERO1, _, ZERO3, OFFLOAD, MULTIHOSTS = SCRIPTS
MUTANTS = {  # file and the tests that must fail: name: (text, instead)
    (BASE, "unit/test_model.py"): {
        "attention sees later tokens": ("is_causal=True", "is_causal=False"),
        "head is not tied": ("        self.head.weight = self.token_embedding.weight", "        pass"),
        "residual layers start as all others": ('getattr(module, "std", 0.02)', "0.02"),
        "decay on norms": (' and "norm" not in name', ""),
        "decay on biases": ('{"params": rest, "weight_decay": 0.0}', '{"params": rest}'),
        "cosine goes down to nothing": ("0.55 + 0.45 *", "0.5 + 0.5 *"),
    },
    (BASE, "unit/test_data.py"): {
        "targets are not shifted": ("blocks[:, :-1], blocks[:, 1:]", "blocks[:, 1:], blocks[:, 1:]"),
        "data order by rank": ("(step * args.world_size + args.rank) * per_rank", "(step + args.rank) * per_rank"),
        "each epoch in the same order": ("seed * 1_000_003 + epoch", "seed"),
        "byte-order mark is a token": ("utf-8-sig", "utf-8"),
        "rows without line break run together": ('text + " \\n" for', "text for"),
    },
    (BASE, "unit/test_metrics.py"): {
        "dropout in validation": ("    model.eval()\n", ""),
        "padding counts as tokens": ("value=-100", "value=0"),
        "perplexity per word by tokens": ("nats / len(text.split())", "nats / len(stream)"),
        "ledger forgets to divide by N": ("args.zero_stage >= stage", "args.zero_stage > stage"),
        "ledger counts a tensor twice": ("                counted.add(memory.data_ptr())\n", ""),
        "NaN goes on": ("not math.isfinite(mean + grad_norm)", "False"),
        "ledger leaves gradients out": ("if tensor.is_leaf and tensor.grad is not None", "if False"),
    },
    ("scripts/tools/common.py", "unit/test_compare_runs.py"): {
        "MFU in fp32": (' or args["precision"] == "fp32"', ""),
    },
    (ZERO1, "unit/test_configs.py"): {
        "flags of batch are ignored": ("args.batch_size or config.get(micro", "config.get(micro"),
        "--precision is ignored": ("            if args.precision or section", "            if section"),
        '"auto" stays': ("        replace_auto(config, ADAMW | AUTO", "        dict(ADAMW | AUTO"),
    },
    (ZERO1, "unit/test_bad_input.py"): {
        "unknown key passes": ("config.keys() - TOP_LEVEL_KEYS", "()"),
        "JSON of another stage passes": ("    if right != ZERO_STAGE:", "    if False:"),
    },
    (ZERO1, "unit/test_checkpoints.py"): {
        "mark before the others' shards": ("    gather(None)  # from here on the shards of all ranks are there\n", ""),
        "newest step though a rank lacks it": (".intersection(*(theirs for _, theirs, _ in found))", ""),
        "each host's own latest tag": ("tag=tag)", "tag=None)"),
        "resumes with other settings": ('        check_settings(mark["settings"], args)', "        pass"),
        "deletes all but one step": ("[:-2]:", "[:-1]:"),
    },
    (ZERO3, "unit/test_checkpoints.py"): {
        "zero.Init left out": ("with deepspeed.zero.Init(config_dict_or_path=ds_config):", "if True:"),
    },
    (MULTIHOSTS, "unit/test_regions.py"): {
        "one byte of a region": ("# a multiple of 64: faster matmuls", "# a multiple of 64: fast matmuls"),
    },
    (BASE, "runs/test_scripts.py::test_accumulation_of_base"): {
        "accumulated losses are not divided": (" / args.gradient_accumulation_steps", ""),
    },
    (BASE, "runs/test_scripts.py::test_base_keeps_fp32_beside_bf16"): {
        "Adam steps in 16 bits": ("copy.deepcopy(model).float()", "copy.deepcopy(model)"),
    },
    (OFFLOAD, "runs/test_starts.py::test_what_deepspeed_cannot_run_here"): {
        "offloading is not checked": ('    check_offload(ds_config["zero_optimization"], args.ds_config)\n', ""),
    },
    (MULTIHOSTS, "unit/test_hosts.py"): {
        "hosts with other JSONs train": (', "JSON": Path(args.ds_config)}', "}"),
        "hosts with other flags train": ("if name not in may_differ", "if False"),
    },
    (MULTIHOSTS, "runs/test_starts.py::test_hosts_that_read_other_data"): {
        "hosts with other data train": ('    compare_hosts({"data": args.data})', "    pass"),
    },
    (BASE, "runs/test_resume.py::test_overwrite_begins_afresh"): {
        "--overwrite deletes nothing": ("if holds_run and args.overwrite:", "if False:"),
    },
}
