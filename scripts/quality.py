"""Validation loss of the default recipe beside nanoGPT's, after equal tokens of the same text at the same shape.

    python scripts/quality.py --dataset DIR                                    about a million tokens of training each
    python scripts/quality.py --dataset sample --tokens 3000000 --seeds 1 2 3
    python scripts/quality.py --dataset DIR --also "lr1e-3=--lr 1e-3 --dropout 0.2"

base                GPTLike-Base.py with its defaults
nanogpt-pretrain    nanoGPT's model with the settings of its GPT-2 run: learning rate 6e-4, no dropout, betas 0.9, 0.95
nanogpt-char        the same with those of its small character-level run: 1e-3, dropout 0.2, betas 0.9, 0.99
--also NAME=FLAGS   GPTLike-Base.py with other flags

nanoGPT's recipes have weight decay 0.1, clipping at 1, random crops, linear warm-up and cosine decay to a tenth. The
warm-up takes 2 % of the steps, as in the character-level run; the GPT-2 run's share is smaller. All see the same
tokenizer, batch and number of tokens, and are validated alike: on every token of the validation split, by one function.
More tokens than the train split has are several epochs; the best step is marked, and the scripts keep its checkpoint.

Runs stay in --output. The same command again continues: a finished run is read, not run again. Writes quality.json,
quality.md and quality.png there. On the CPU. Exit 0: written; 1: a run failed or cannot be read; 2: wrong usage.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only: works without a display
from benchmark import markdown_row, processor, versions
from matplotlib import pyplot
from rivals import ROOT, base
from tqdm import tqdm

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito: for all eyes
DASHES = ("-", "--", ":", "-.")  # by seed
NANOGPT = {
    "nanogpt-pretrain": {"lr": 6e-4, "dropout": 0.0, "beta2": 0.95},
    "nanogpt-char": {"lr": 1e-3, "dropout": 0.2, "beta2": 0.99},
}
FIGURES = {"loss": ".4f", "perplexity": ",.2f", "word_perplexity": ",.1f", "bits_per_byte": ".4f"}


class Run(NamedTuple):
    name: str
    seed: int
    words: tuple[str, ...]  # the command without --output_dir
    folder: Path


class Point(NamedTuple):
    """One validation."""

    tokens: int
    loss: float
    perplexity: float
    word_perplexity: float
    bits_per_byte: float


def steps_of(args: argparse.Namespace) -> int:
    return math.ceil(args.tokens / (args.batch_size * args.block_size))


def recipes(args: argparse.Namespace) -> dict[str, list[str]]:
    """By name the script and its own flags."""
    found = {"base": [str(ROOT / "GPTLike-Base.py")]}
    warmup = str(max(1, round(steps_of(args) / 50)))
    for name, settings in NANOGPT.items():
        flags = [word for flag, value in settings.items() for word in (f"--{flag}", str(value))]
        flags += ["--weight_decay", "0.1", "--warmup_steps", warmup, "--random_crops"]
        found[name] = [str(ROOT / "scripts/rivals.py"), "nanogpt", *flags]
    for name, flags in args.also:
        found[name] = [str(ROOT / "GPTLike-Base.py"), *flags]
    return found


def make_runs(args: argparse.Namespace) -> list[Run]:
    """Every recipe with every seed; the flags that all share come last and win."""
    shared, steps = [], steps_of(args)
    for name in ("n_layer", "n_head", "d_model", "block_size", "batch_size", "precision", "tokenizer"):
        shared += [f"--{name}", str(getattr(args, name))]
    dataset = args.dataset if args.dataset in ("sample", "wikitext2") else str(Path(args.dataset).resolve())
    shared += ["--dataset", dataset, "--max_steps", str(steps), "--save_interval", "0"]
    shared += ["--eval_interval", str(max(1, steps // args.evaluations)), "--log_interval", str(max(1, steps // 100))]
    return [
        Run(name, seed, (*words, *shared, "--seed", str(seed)), args.output / f"{name}-seed{seed}")
        for seed in args.seeds
        for name, words in recipes(args).items()
    ]


def is_finished(run: Run) -> bool:
    """Raises ValueError where the folder holds a run with other settings."""
    try:
        words = json.loads((run.folder / "command.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    if words != list(run.words):
        raise ValueError(
            f"{run.folder} holds a run with other settings: {shlex.join(words[1:])}. Choose another --output"
        )
    return (run.folder / "summary.json").exists()


def last_step(run: Run) -> int:
    """How far a run is, by its metrics.jsonl."""
    metrics = run.folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def train(run: Run, bar: tqdm) -> None:
    """Run to the end, moving the bar. Base continues where it was cut off, a rival starts again.

    Raises ValueError with the last words of a run that fails.
    """
    if run.folder.exists() and "GPTLike-Base.py" not in run.words[0]:
        shutil.rmtree(run.folder)
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "command.json").write_text(json.dumps(run.words) + "\n", encoding="utf-8")
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    bar.set_description(run.folder.name)
    before = bar.n
    with (run.folder / "log.txt").open("w") as log:
        words = [sys.executable, *run.words, "--output_dir", str(run.folder)]
        process = subprocess.Popen(words, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                bar.update(before + last_step(run) - bar.n)
                time.sleep(0.5)
        finally:
            process.terminate()
            process.wait()
    if process.returncode:
        last = "\n".join((run.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise ValueError(f"{shlex.join(words)}\nended with exit code {process.returncode}:\n{last}")
    bar.update(before + last_step(run) - bar.n)


def validations(run: Run, args: argparse.Namespace) -> list[Point]:
    """From metrics.jsonl, in order."""
    text = (run.folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [line for line in map(json.loads, text.splitlines()) if "validation_loss" in line]
    width = args.batch_size * args.block_size
    return [Point(line["step"] * width, *(line[f"validation_{name}"] for name in FIGURES)) for line in lines]


def best(points: list[Point]) -> Point:
    return min(points, key=lambda point: point.loss)


def table(curves: dict[Run, list[Point]]) -> str:
    """One row a run: the loss at the end, and all figures at the best validation."""
    headings = "recipe", "seed", "final loss", "best loss", "after tokens", "perplexity per token", "per word"
    text = markdown_row(*headings, "bits per byte") + "|---|--:|--:|--:|--:|--:|--:|--:|\n"
    for run, points in curves.items():
        top = best(points)
        loss, *others = (f"{getattr(top, name):{form}}" for name, form in FIGURES.items())
        text += markdown_row(run.name, run.seed, f"{points[-1].loss:.4f}", loss, f"{top.tokens:,}", *others)
    return text


def verdict(curves: dict[Run, list[Point]]) -> str:
    """How far Base's mean over the seeds is from the better of nanoGPT's, at the end and at the best step."""

    def means(pick) -> dict[str, float]:
        names = dict.fromkeys(run.name for run in curves)
        return {name: mean(pick(points).loss for run, points in curves.items() if run.name == name) for name in names}

    text = ""
    for what, pick in (("at the end", lambda points: points[-1]), ("at the best step", best)):
        found = means(pick)
        rival = min(NANOGPT, key=found.get)
        text += (
            f"{what}: base {found['base']:.4f}, {rival} {found[rival]:.4f}: {found['base'] - found[rival]:+.4f} nats\n"
        )
    return text


def heading(args: argparse.Namespace, corpus) -> str:
    """Hardware, versions, date, shape, tokenizer and splits."""
    sizes = ((split, len(corpus.streams[split]), *size.values()) for split, size in corpus.sizes.items())
    splits = "; ".join(
        f"{split} {tokens:,} tokens, {size:,} bytes, {words:,} words" for split, tokens, size, words in sizes
    )
    epochs = args.tokens / len(corpus.streams["train"])
    shape = f"{args.n_layer} layers, d_model {args.d_model}, {args.n_head} heads, {args.batch_size} x {args.block_size}"
    return (f"{processor()}, {os.cpu_count()} CPU cores; {versions()}; {time.strftime('%Y-%m-%d')}. {shape} tokens, "
            f"{args.precision}, {steps_of(args):,} steps: {epochs:.2f} epochs. Tokenizer {args.tokenizer}, "
            f"{corpus.vocab_size:,} tokens. {splits}.")  # fmt: skip


def plot(curves: dict[Run, list[Point]], path: Path) -> None:
    """Validation loss against tokens, a colour a recipe, a dash a seed; the best step is a star."""
    figure, axes = pyplot.subplots(figsize=(9, 5.5), dpi=120, layout="constrained")
    names, seeds = (list(dict.fromkeys(getattr(run, field) for run in curves)) for field in ("name", "seed"))
    for run, points in curves.items():
        number = seeds.index(run.seed)
        color, dashes = PALETTE[names.index(run.name) % len(PALETTE)], DASHES[number % len(DASHES)]
        label = run.name if number == 0 else None
        axes.plot(
            [p.tokens for p in points], [p.loss for p in points], color=color, linestyle=dashes, marker=".", label=label
        )
        axes.plot(best(points).tokens, best(points).loss, "*", color=color, markersize=14)
    axes.set(xlabel="tokens trained on", ylabel="validation loss (nats per token); star: best step")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def named_flags(text: str) -> tuple[str, list[str]]:
    name, _, flags = text.partition("=")
    if not name.replace("-", "").replace(".", "").isalnum() or name in ("base", *NANOGPT) or not flags:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=FLAGS, with a name of letters and digits of its own")
    return name, shlex.split(flags)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dataset", required=True, help="a folder with train*, valid*; sample; or wikitext2 (Hub)")
    parser.add_argument("--tokenizer", default="bpe:8192", help="bpe:SIZE, gpt2 (Hub), or a tokenizer.json's path")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="to train on, per run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="of initialization, order and dropout")
    parser.add_argument("--evaluations", type=int, default=10, help="validations in a run")
    parser.add_argument(
        "--also", type=named_flags, action="append", default=[], metavar="NAME=FLAGS", help="more recipes"
    )
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="nanogpt: by autocast")
    parser.add_argument("--n_layer", type=int, default=6, help="transformer blocks")
    parser.add_argument("--n_head", type=int, default=6, help="attention heads per block")
    parser.add_argument("--d_model", type=int, default=384, help="width of the residual stream")
    parser.add_argument("--block_size", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences per optimizer step")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"), help="folder for runs and results")
    return parser


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("tokens", "evaluations", "n_layer", "n_head", "d_model", "block_size", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.d_model % args.n_head:
        parser.error(f"--d_model {args.d_model} is not a multiple of --n_head {args.n_head}")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {' '.join(map(str, args.seeds))}: must be different, and at least 0")
    if len({name for name, _ in args.also}) < len(args.also):
        parser.error("--also: one name is given twice")


def compare(args: argparse.Namespace) -> str:
    """Train what is not finished. Returns the Markdown."""
    runs, steps, curves = make_runs(args), steps_of(args), {}
    waiting = [run for run in runs if not is_finished(run)]
    corpus = base.load_corpus(args)
    with tqdm(total=len(waiting) * steps, unit="step") as bar:
        for run in waiting:
            train(run, bar)
    curves = {run: validations(run, args) for run in runs}
    text = f"{heading(args, corpus)}\n\n{table(curves)}\n{verdict(curves)}"
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "quality.md").write_text(text, encoding="utf-8")
    found = {run.folder.name: [point._asdict() for point in points] for run, points in curves.items()}
    (args.output / "quality.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    plot(curves, args.output / "quality.png")
    return text


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    check_args(parser, args)
    try:
        print(compare(args), end="")
    except (OSError, ValueError, KeyError, base.UserError) as error:
        sys.exit(f"quality.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"wrote quality.json, quality.md and quality.png to {args.output}")


if __name__ == "__main__":
    main()
