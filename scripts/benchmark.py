"""Speed of the six scripts beside other ways to train the same GPT, on this machine's CPU, in one run.

    python scripts/benchmark.py                                  all contestants, two vocabularies: about an hour
    python scripts/benchmark.py --contestants base nanogpt --vocabulary 8192 --rounds 1
    python scripts/benchmark.py --scaling 1 2 4 --contestants zero1 zero2

Each round launches every contestant once, one after the other, so that a slow minute of the machine hits all of them
alike. The scripts run as they are, through their command line, and so do the rivals (scripts/rivals.py); all read the
same tokens and share the cores alike among ranks. A name that ends in -compile adds --compile: base-compile,
zero2-compile, nanogpt-compile. Tokens per second are the median over the rounds of the median over the steps, without
the first three. The ceiling is what the machine's matmuls reach at the model's own sizes, measured in every round. A
model's operations are counted as 6P + 12 x layers x width x block per token, P being its parameters.

With --scaling the ZeRO scripts run on several numbers of ranks. Strong: the global batch stays --batch_size. Weak: the
micro batch stays that of the most ranks. Ranks share this machine's cores, so that all numbers of ranks have the same
arithmetic to draw on: what is lost against one rank is the price of communication and of smaller matmuls. Beside it
stands what scripts/plan_memory.py predicts from one rank's speed and the speed of an all-reduce, measured, too.

Writes benchmark.json, benchmark.md and benchmark.png (with --scaling: scaling.*) to --output; benchmark.json after each
round. GPUs are hidden. Exit 0: written; 1: a contestant failed, its last words are shown; 2: wrong usage.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only: works without a display
import tokenizers
import torch
from matplotlib import pyplot
from plan_memory import Model, predict, read_plan
from rivals import base
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
PALETTE = ("#0072B2", "#E69F00")  # the scripts, their rivals; Okabe and Ito: for all eyes
SKIPPED = 3  # first steps: caches fill, torch.compile compiles, and the second counts its memory
LINEARS = ((1, 3), (1, 1), (1, 4), (4, 1))  # of a block, inputs and outputs in widths


class Contestant(NamedTuple):
    script: str
    flags: tuple[str, ...] = ()  # besides those that all have
    several: bool = True  # runs on --ranks
    precision: str | None = None  # where it knows one only
    references: tuple[str, ...] = ()  # whom its speed is divided by


def zero(name: str, config: str, trainer: str) -> Contestant:
    flags = ("--ds_config", f"configs/{config}.json")
    return Contestant(f"DeepSpeed-GPTLike-{name}.py", flags, references=("ddp", trainer))


def trainer(config: str) -> Contestant:
    return Contestant("scripts/rivals.py", ("trainer", "--ds_config", f"configs/{config}.json"), references=("ddp",))


CONTESTANTS = {
    "base": Contestant("GPTLike-Base.py", several=False, references=("nanogpt", "original")),
    "nanogpt": Contestant("scripts/rivals.py", ("nanogpt",), several=False),
    "original": Contestant("scripts/rivals.py", ("original",), several=False, precision="fp32"),
    "ddp": Contestant("scripts/rivals.py", ("ddp",)),
    "zero1": zero("ZeRO-1", "zero1", "trainer1"),
    "zero2": zero("ZeRO-2", "zero2", "trainer2"),
    "zero3": zero("ZeRO-3", "zero3", "trainer3"),
    "offload": zero("ZeRO-Offload", "zero_offload", "trainer2"),
    "multihosts": zero("Multihosts", "multihosts", "trainer2"),
    "trainer1": trainer("zero1"),
    "trainer2": trainer("zero2"),
    "trainer3": trainer("zero3"),
}
DEFAULT = ["base", "base-compile", *list(CONTESTANTS)[1:]]


class Job(NamedTuple):
    """One launch."""

    name: str
    contestant: Contestant
    ranks: int
    micro_batch: int
    precision: str


def contestant(name: str) -> Contestant:
    """The contestant of a name, with --compile where it ends so. Raises ValueError for a name that is none."""
    stem = name.removesuffix("-compile")
    if stem not in CONTESTANTS or (name != stem and stem.startswith("trainer")):
        raise ValueError(f"no contestant {name}; there are {' '.join(CONTESTANTS)}, and all but trainer* with -compile")
    found = CONTESTANTS[stem]
    return found if name == stem else found._replace(flags=(*found.flags, "--compile"))


def threads_per_rank(ranks: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def apart(function: Callable, *args: object) -> object:
    """What the function returns, from a process of its own. This one stays small: by Linux's count the peak memory of a
    process that it starts begins with its own."""
    quiet = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}  # Ctrl-C is for this process
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), **quiet) as pool:
        return pool.submit(function, *args).result()


# What all contestants read.
def write_synthetic(folder: Path, vocabulary: int, args: argparse.Namespace) -> str:
    """Random tokens, the k-th as often as 1/k, as words of a file. Returns the path of a tokenizer that reads them."""
    torch.manual_seed(0)
    frequencies = 1 / torch.arange(1, vocabulary + 1)
    for name, blocks in (("train", 16 * args.batch_size), ("valid", 4)):
        ids = torch.multinomial(frequencies, (blocks + 1) * args.block_size, replacement=True)
        lines = [" ".join(map(str, line.tolist())) for line in ids.split(args.block_size)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(k): k for k in range(vocabulary)}, "0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def write_text(folder: Path, vocabulary: int, args: argparse.Namespace) -> str:
    """The data set's train split, and a few blocks of its validation split, which every run reads at its end."""
    texts = base.read_texts(args.dataset)
    (folder / "train.txt").write_text(texts["train"], encoding="utf-8", newline="")
    (folder / "valid.txt").write_text(texts["validation"][: 64 * args.block_size], encoding="utf-8", newline="")
    return f"bpe:{vocabulary}"


def prepare_data(folder: Path, vocabulary: int, args: argparse.Namespace) -> list[str]:
    """The flags with which a script reads the data, tokenized already. Raises ValueError where it is too little."""
    folder.mkdir(parents=True)
    base.log = lambda message: None
    try:
        write_data = write_synthetic if args.dataset == "synthetic" else write_text
        tokenizer = write_data(folder, vocabulary, args)
        names = {"dataset": str(folder), "tokenizer": tokenizer, "block_size": args.block_size}
        corpus = base.load_corpus(argparse.Namespace(**names))
    except base.UserError as error:
        raise ValueError(str(error)) from error
    if corpus.vocab_size != vocabulary:
        raise ValueError(f"--dataset {args.dataset} gives {corpus.vocab_size:,} tokens and not --vocabulary "
                         f"{vocabulary:,}: take a smaller vocabulary, more text, or synthetic")  # fmt: skip
    return ["--dataset", str(folder), "--tokenizer", tokenizer]


# One launch.
def command(job: Job, data: list[str], output: Path, args: argparse.Namespace) -> list[str]:
    """The command line of a contestant."""
    script, *flags = job.contestant.script, *job.contestant.flags
    flags = [str(ROOT / flag) if flag.startswith("configs/") else flag for flag in flags]
    for name in ("n_layer", "n_head", "d_model", "block_size", "dropout"):
        flags += [f"--{name}", str(getattr(args, name))]
    flags += [*data, "--batch_size", str(job.micro_batch), "--precision", job.precision, "--max_steps", str(args.steps)]
    flags += ["--log_interval", "1", "--eval_interval", "0", "--save_interval", "0", "--output_dir", str(output)]
    words = [str(ROOT / script), *flags]
    if not job.contestant.several:
        return [sys.executable, *words]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if args.launcher == "deepspeed" and "ddp" not in flags:
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(job.ranks)]
        return [*launcher, "--master_port", port, *words]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(job.ranks)]
    return [*launcher, "--master_port", port, *words]


def environment(ranks: int, cache: Path) -> dict[str, str]:
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # this Python's ninja
    return inherited | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "GPTLIKE_CACHE": str(cache), "PATH": path,
                        "OMP_NUM_THREADS": str(threads_per_rank(ranks)), "HF_HUB_OFFLINE": "1"}  # fmt: skip


def launch(words: list[str], output: Path, env: dict[str, str]) -> float | None:
    """Run to the end. Returns the seconds from the command to the first optimizer step, if one was logged.

    Raises ValueError with the last words of a run that fails.
    """
    output.mkdir(parents=True)
    metrics, first = output / "metrics.jsonl", None
    with (output / "log.txt").open("w") as log:
        start = time.perf_counter()
        process = subprocess.Popen(words, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            while first is None and process.poll() is None:
                if metrics.exists() and metrics.stat().st_size:
                    first = time.perf_counter() - start
                time.sleep(0.02)
            code = process.wait()
        finally:
            process.terminate()  # torchrun ends its ranks
            process.wait()
    if code:
        last = "\n".join((output / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise ValueError(f"{' '.join(words)}\nended with exit code {code}:\n{last}")
    return first


def run_once(job: Job, data: list[str], folder: Path, args: argparse.Namespace) -> dict:
    """What one launch measured: tokens_per_second, first_step_s, peak_memory_gib of rank 0, parameters."""
    output = folder / job.name
    shutil.rmtree(output, ignore_errors=True)
    first = launch(command(job, data, output, args), output, environment(job.ranks, folder / "tokens"))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    shutil.rmtree(output)  # its checkpoint may be large
    return {"tokens_per_second": steady(lines), "first_step_s": first, "parameters": summary["parameters"],
            "peak_memory_gib": max(line["peak_memory_gib"] for line in lines if "peak_memory_gib" in line)}  # fmt: skip


def link_speed(ranks: int, data: list[str], folder: Path, args: argparse.Namespace) -> float:
    """10**9 bytes a second that each rank sends in an all-reduce."""
    output, job = folder / "link", Job("link", Contestant("scripts/rivals.py", ("link",)), ranks, 1, args.precision)
    shutil.rmtree(output, ignore_errors=True)
    launch(command(job, data, output, args), output, environment(ranks, folder / "tokens"))
    return json.loads((output / "summary.json").read_text(encoding="utf-8"))["link_gb_s"]


def import_seconds(folder: Path) -> float:
    """Of `import deepspeed` in a process of its own."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import deepspeed"], env=environment(1, folder), check=True)
    return time.perf_counter() - start


# Arithmetic.
def steady(lines: list[dict]) -> float:
    """The median rate of the steps after the first ones."""
    return median([line["tokens_per_second"] for line in lines if "tokens_per_second" in line][SKIPPED:])


def flops_per_token(parameters: int, args: argparse.Namespace) -> int:
    """Forward and backward, as the scripts count for MFU: 6P and, of attention, 12 x layers x width x block."""
    return 6 * parameters + 12 * args.n_layer * args.d_model * args.block_size


def gemms(vocabulary: int, args: argparse.Namespace) -> list[tuple[int, int, int, int]]:
    """(rows, inputs, outputs, count) of a forward pass's matmuls: a batch in the blocks, a part of it in the head."""
    rows, width, part = args.batch_size * args.block_size, args.d_model, 256 * (1 + vocabulary // 2**14)
    blocks = [(rows, a * width, b * width, args.n_layer) for a, b in LINEARS]
    return [*blocks, (min(rows, part), width, -(-vocabulary // 64) * 64, -(-rows // part))]


def ceiling_gflops(vocabulary: int, precision: str, args: argparse.Namespace, repeats: int = 5) -> float:
    """What the machine reaches in the model's matmuls alone, forward and backward, on all its cores."""
    dtype, operations, seconds = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision], 0, 0.0
    torch.set_num_threads(threads_per_rank(1))
    for rows, inputs, outputs, count in gemms(vocabulary, args):
        x, weight, grad = (torch.randn(*shape, dtype=dtype) for shape in
                           ((rows, inputs), (outputs, inputs), (rows, outputs)))  # fmt: skip
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            torch.mm(x, weight.T), torch.mm(grad, weight), torch.mm(grad.T, x)
            times.append(time.perf_counter() - start)
        operations += 6 * rows * inputs * outputs * count
        seconds += median(times) * count
    return operations / seconds / 1e9


def summarize(runs: dict[str, list[dict]], ceilings: dict[str, list[float]], jobs: list[Job], args):
    """By contestant the medians over the rounds, its speed as a multiple of its references', its share of the
    ceiling."""
    rows = {}
    for job in (job for job in jobs if runs.get(job.name)):
        fields = ("tokens_per_second", "first_step_s", "peak_memory_gib", "parameters")
        row = {field: median(run[field] for run in runs[job.name]) for field in fields}
        row |= {"ranks": job.ranks, "micro_batch": job.micro_batch, "precision": job.precision, "ratios": {}}
        done = row["tokens_per_second"] * flops_per_token(row["parameters"], args) / 1e9
        row["ceiling_share"] = done / median(ceilings[job.precision])
        row["is_rival"] = job.contestant.script == "scripts/rivals.py"
        row["rounds"] = [run["tokens_per_second"] for run in runs[job.name]]
        rows[job.name] = row
    for job in jobs:
        for other in job.contestant.references:
            if job.name in rows and other in rows:
                ratio = rows[job.name]["tokens_per_second"] / rows[other]["tokens_per_second"]
                rows[job.name]["ratios"][other] = ratio
    return rows


def predicted(job: Job, one_rank: float, link: float, vocabulary: int, args: argparse.Namespace) -> float:
    """The planner's tokens a second of all ranks. one_rank is measured with all cores, and each of the ranks has its
    share of them."""
    model = Model(args.n_layer, args.n_head, args.d_model, args.block_size, -(-vocabulary // 64) * 64)
    batch = argparse.Namespace(batch_size=job.micro_batch, gradient_accumulation_steps=1, precision=job.precision)
    plan = read_plan(ROOT / job.contestant.flags[1], batch)
    return predict(model, plan, job.ranks, link=link, one_rank=one_rank / job.ranks).weak


def add_scaling(rows: dict[str, dict], jobs: list[Job], links: dict[int, list[float]], vocabulary: int, args) -> None:
    """To each row on several ranks: how it compares with one rank that has the same global batch (strong) or the same
    micro batch (weak), and what the planner predicts from that rank's speed."""
    for job in (job for job in jobs if job.ranks > 1):
        row, stem = rows[job.name], job.name.rpartition("-")[0]
        for name, batch in (("weak", job.micro_batch), ("strong", job.ranks * job.micro_batch)):
            if alone := rows.get(f"{stem}-1x{batch}"):
                row[name] = row["tokens_per_second"] / alone["tokens_per_second"]
                link = median(links[job.ranks])
                row["predicted"] = predicted(job, alone["tokens_per_second"], link, vocabulary, args)


# What is written.
def versions() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    return f"{packages}, Python {platform.python_version()}"


def heading(args: argparse.Namespace) -> str:
    shape = f"{args.n_layer} layers, d_model {args.d_model}, {args.n_head} heads, {args.batch_size} x {args.block_size}"
    return (f"{processor()}, {os.cpu_count()} CPU cores; {versions()}; "
            f"{time.strftime('%Y-%m-%d')}. {shape} tokens, dropout {args.dropout}, {args.dataset} tokens, "
            f"{args.rounds} rounds of {args.steps} steps, launched with {args.launcher}.")  # fmt: skip


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def markdown_row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


def optional(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


COLUMNS: dict[str, Callable[[dict], str]] = {  # heading: cell
    "ranks x micro batch": lambda row: f"{row['ranks']} x {row['micro_batch']}",
    "precision": lambda row: row["precision"],
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "ratio": lambda row: ", ".join(f"{ratio:.2f}x {other}" for other, ratio in row["ratios"].items()) or "-",
    "of one rank, same global batch": lambda row: optional(row.get("strong"), ".0%"),
    "same micro batch": lambda row: optional(row.get("weak"), ".0%"),
    "planner's tokens/s": lambda row: optional(row.get("predicted"), ",.0f"),
    "of the ceiling": lambda row: f"{row['ceiling_share']:.0%}",
    "first step, s": lambda row: f"{row['first_step_s']:.1f}",
    "peak GiB, rank 0": lambda row: f"{row['peak_memory_gib']:.2f}",
}
ONLY_SCALING = ("of one rank, same global batch", "same micro batch", "planner's tokens/s")


def markdown(results: dict, args: argparse.Namespace) -> str:
    """A table for each vocabulary."""
    text = heading(args) + "\n"
    text += f"\n`import deepspeed` takes {median(results['import_deepspeed_s']):.1f} s in a process of its own.\n"
    for ranks, speeds in results["links_gb_s"].items():
        text += f"In an all-reduce each of {ranks} ranks sends {median(speeds):.2f} GB/s.\n"
    for vocabulary, result in results["vocabularies"].items():
        ceilings = ", ".join(f"{name} {median(values):,.0f}" for name, values in result["ceilings_gflops"].items())
        text += f"\nVocabulary {int(vocabulary):,}. Matmul ceiling in GFLOP/s: {ceilings}.\n\n"
        columns = {name: cell for name, cell in COLUMNS.items()
                   if args.scaling and name != "ratio" or not args.scaling and name not in ONLY_SCALING}  # fmt: skip
        text += markdown_row("contestant", *columns) + f"|---{'|--:' * len(columns)}|\n"
        for name, row in result["contestants"].items():
            text += markdown_row(name, *(cell(row) for cell in columns.values()))
    return text


def plot(results: dict, path: Path) -> None:
    """A panel for each vocabulary: medians as bars, rounds as points, the planner's predictions as diamonds."""
    panels = results["vocabularies"]
    size = {"figsize": (6 * len(panels), 5), "dpi": 120, "layout": "constrained"}
    figure, axes = pyplot.subplots(1, len(panels), squeeze=False, **size)
    for axis, (vocabulary, result) in zip(axes[0], panels.items(), strict=True):
        rows = result["contestants"]
        for place, row in enumerate(rows.values()):
            label = ("the scripts", "their rivals")[row["is_rival"]]
            axis.barh(place, row["tokens_per_second"], color=PALETTE[row["is_rival"]], label=label)
            axis.plot(row["rounds"], [place] * len(row["rounds"]), "k.", markersize=4, label="a round")
            if "predicted" in row:
                axis.plot(row["predicted"], place, "D", color="white", markeredgecolor="black", label="the planner")
        axis.set(yticks=range(len(rows)), yticklabels=rows, xlabel="tokens/s", title=f"vocabulary {int(vocabulary):,}")
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    legend = dict(zip(labels, handles, strict=True))  # each once
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend))
    figure.savefig(path)
    pyplot.close(figure)


def write_results(results: dict, args: argparse.Namespace) -> str:
    """Returns the Markdown."""
    stem, text = args.output / results["name"], markdown(results, args)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot(results, stem.with_suffix(".png"))
    return text


# The rounds.
def make_jobs(args: argparse.Namespace) -> list[Job]:
    """All launches of one round. The global batch is --batch_size, on however many ranks; with --scaling also a smaller
    one, with each rank's share of it on the most ranks."""
    jobs = []
    for name in args.contestants:
        found = contestant(name)
        precision = found.precision or args.precision
        if not args.scaling:
            ranks = args.ranks if found.several else 1
            jobs.append(Job(name, found, ranks, args.batch_size // ranks, precision))
        for ranks in args.scaling:
            for micro in dict.fromkeys((args.batch_size // ranks, args.batch_size // max(args.scaling))):
                jobs.append(Job(f"{name}-{ranks}x{micro}", found, ranks, micro, precision))
    return jobs


class Rounds:
    """What is measured, and how far it is."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder, self.jobs, self.data = args, folder, make_jobs(args), {}
        self.runs, self.ceilings, self.imports = {}, {}, []
        self.links = {ranks: [] for ranks in args.scaling if ranks > 1}
        for size in args.vocabulary:
            self.data[size] = apart(prepare_data, folder / str(size), size, args)
            self.runs[size], self.ceilings[size] = {job.name: [] for job in self.jobs}, {"bf16": [], "fp32": []}

    def measure_once(self, bar: tqdm) -> None:
        """One round."""
        self.imports.append(import_seconds(self.folder))
        for ranks, speeds in self.links.items():
            speeds.append(link_speed(ranks, self.data[self.args.vocabulary[0]], self.folder, self.args))
        for size in self.args.vocabulary:
            for precision, found in self.ceilings[size].items():
                found.append(apart(ceiling_gflops, size, precision, self.args))
            for job in self.jobs:
                bar.set_description(f"{job.name}, vocabulary {size:,}")
                self.runs[size][job.name].append(run_once(job, self.data[size], self.folder, self.args))
                bar.update()

    def results(self) -> dict:
        """All that is written, after one round or more."""
        settings = {name: value for name, value in vars(self.args).items() if name != "output"}
        found = {"name": "scaling" if self.args.scaling else "benchmark", "heading": heading(self.args)}
        found |= {"settings": settings, "import_deepspeed_s": self.imports, "links_gb_s": self.links}
        vocabularies = {}
        for size, runs in self.runs.items():
            rows = summarize(runs, self.ceilings[size], self.jobs, self.args)
            if self.args.scaling:
                add_scaling(rows, self.jobs, self.links, size, self.args)
            vocabularies[str(size)] = {"ceilings_gflops": self.ceilings[size], "contestants": rows}
        return found | {"vocabularies": vocabularies}


def benchmark(args: argparse.Namespace, folder: Path) -> None:
    rounds = Rounds(args, folder)
    args.output.mkdir(parents=True, exist_ok=True)
    with tqdm(total=args.rounds * len(args.vocabulary) * len(rounds.jobs), unit="launch") as bar:
        for _ in range(args.rounds):
            rounds.measure_once(bar)
            text = write_results(results := rounds.results(), args)
    print(text, end="")
    print(f"wrote {results['name']}.json, {results['name']}.md and {results['name']}.png to {args.output}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("what is measured").add_argument
    add("--contestants", nargs="+", metavar="NAME", default=DEFAULT, help="of the table above, in this order")
    add("--vocabulary", type=int, nargs="+", default=[8192, 50257], help="sizes, each measured by itself")
    add("--ranks", type=int, default=2, help="of the contestants that run on several")
    add("--precision", choices=["bf16", "fp32"], default="bf16", help="of all but original, which knows fp32 only")
    add("--rounds", type=int, default=3, help="launches of each contestant")
    add("--steps", type=int, default=12, help=f"optimizer steps a launch; the first {SKIPPED} do not count")
    add("--launcher", choices=["torchrun", "deepspeed"], default="torchrun", help="of all on several ranks but ddp")
    add("--scaling", type=int, nargs="+", metavar="RANKS", default=[], help="numbers of ranks, in place of --ranks")
    add("--output", type=Path, default=Path("runs/benchmark"), help="folder for the results")
    add = parser.add_argument_group("shape").add_argument
    add("--n_layer", type=int, default=6, help="transformer blocks")
    add("--n_head", type=int, default=6, help="attention heads per block")
    add("--d_model", type=int, default=384, help="width of the residual stream")
    add("--block_size", type=int, default=256, help="tokens per sequence")
    add("--batch_size", type=int, default=8, help="sequences per optimizer step, all ranks together")
    add("--dropout", type=float, default=0.1, help="as each contestant uses it")
    add("--dataset", default="synthetic", help="synthetic (random tokens), sample, wikitext2, or a folder with train*")
    return parser


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("n_layer", "n_head", "d_model", "block_size", "batch_size", "ranks", "rounds", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.steps <= SKIPPED:
        parser.error(f"--steps {args.steps}: must be more than the {SKIPPED} that do not count")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout {args.dropout} must be at least 0 and below 1")
    if args.d_model % args.n_head:
        parser.error(f"--d_model {args.d_model} is not a multiple of --n_head {args.n_head}")
    for ranks in args.scaling or [args.ranks]:
        if ranks < 1 or args.batch_size % ranks:
            parser.error(f"--batch_size {args.batch_size} is not a multiple of {ranks} ranks")
    if min(args.vocabulary) < 256:
        parser.error(f"--vocabulary {min(args.vocabulary)}: must be at least 256")
    for given in (args.contestants, args.vocabulary, args.scaling):
        if len(set(given)) < len(given):
            parser.error(f"{' '.join(map(str, given))}: one is named twice")
    try:
        found = [contestant(name) for name in args.contestants]
    except ValueError as error:
        parser.error(f"--contestants: {error}")
    if args.scaling and not all(each.script.startswith("DeepSpeed") for each in found):
        parser.error("--scaling is for the ZeRO scripts: add --contestants zero1 zero2")


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    check_args(parser, args)
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark.") as folder:
            os.environ["GPTLIKE_CACHE"] = str(Path(folder, "tokens"))  # the user's own stays as it is
            benchmark(args, Path(folder))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"benchmark.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
