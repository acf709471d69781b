"""Draw the README's pictures, each for a light and a dark page, from the data beside them.

    python scripts/dev/pictures.py                      docs/pictures/*.svg anew
    python scripts/dev/pictures.py --runs RUN RUN ...   first take these runs' losses into docs/pictures/losses.json

stages    bytes of model states that a rank keeps at two ranks, as plan_memory.py computes them
losses    losses.json, of runs of the six scripts with --dataset DIR --tokenizer bpe:1024 --n_layer 2 --n_head 4
          --d_model 128 --block_size 64 --dropout 0 --precision fp32 --max_steps 100 --log_interval 1
          --save_interval 0 --eval_interval 0, Base with --batch_size 16, the others on two ranks with 8

Each SVG carries its data as the description in its metadata.
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from common import ROOT, read_json, read_metrics
from plan_memory import formula

FOLDER = ROOT / "docs" / "pictures"
THEMES = {"light": ("#1f2328", "#ffffff"), "dark": ("#e6edf3", "#0d1117")}
KINDS = {"parameters": "#0f96ff", "gradients": "#e1780f", "optimizer_states": "#8b5cf6"}
COLOURS = ("#0f96ff", "#e1780f", "#8b5cf6", "#d1242f", "#2da44e", "#b48778")
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 4)), (0, (1, 3)))


def stages():
    """By bar: the bytes of one parameter's states, by kind, that a rank of two keeps."""
    found = {name: formula(1, 2, stage) for stage, name in enumerate(("Base", "ZeRO-1", "ZeRO-2", "ZeRO-3"))}
    found["Offload, GPU"] = found["ZeRO-2"] | {"optimizer_states": 0}
    found["Offload, host"] = found["ZeRO-2"] | {"parameters": 0, "gradients": 0}
    return found


def draw_stages(axes, data):
    names, left = list(data), [0.0] * len(data)
    for kind, colour in KINDS.items():
        sizes = [data[name][kind] for name in names]
        axes.barh(names, sizes, left=left, color=colour, label=kind.replace("_", " "))
        left = [below + size for below, size in zip(left, sizes, strict=True)]
    for name, total in zip(names, left, strict=True):
        axes.text(total + 0.2, name, f"{total:g}P", va="center")
    axes.invert_yaxis()
    axes.set(xlabel="bytes of model states on a rank, P parameters, 2 ranks, 16-bit Adam", xlim=(0, 18))


def draw_losses(axes, data):
    for number, (name, series) in enumerate(data.items()):
        steps, values = list(map(int, series)), list(series.values())
        width = 6 - number * 0.8  # all curves lie on each other: the later ones are thinner
        axes.plot(steps, values, color=COLOURS[number], lw=width, ls=LINE_STYLES[number], label=name)
    axes.set(xlabel="optimizer step", ylabel="train loss, nats per token")


def draw(name, chart, data, theme, folder):
    ink, paper = THEMES[theme]
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with pyplot.rc_context(dict.fromkeys(inks, ink) | {"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 12}):
        figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained", facecolor=paper)
        axes.set_facecolor(paper)
        axes.spines[["top", "right"]].set_visible(False)
        chart(axes, data)
        axes.legend(frameon=False)
        figure.savefig(folder / f"{name}-{theme}.svg", metadata={"Date": None, "Description": json.dumps(data)})
        pyplot.close(figure)


def draw_all(folder):
    for theme in THEMES:
        draw("stages", draw_stages, stages(), theme, folder)
        draw("losses", draw_losses, read_json(FOLDER / "losses.json"), theme, folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=Path, metavar="RUN", help="--output_dir of runs; its name is shown")
    args = parser.parse_args()
    if args.runs:
        found = {}
        for run in args.runs:
            found[run.name] = {step: fields["loss"] for step, fields in read_metrics(run).items()}
        (FOLDER / "losses.json").write_text(json.dumps(found) + "\n")
    draw_all(FOLDER)
    base, *others = read_json(FOLDER / "losses.json").values()
    apart = max((abs(curve[step] - base[step]) for curve in others for step in base), default=0.0)
    print(f"drew {FOLDER}; {len(base)} steps, no loss is more than {apart:.1e} from the first run's")


if __name__ == "__main__":
    main()
