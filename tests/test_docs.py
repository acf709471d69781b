"""The pages of docs/ are true: commands parse, files and links exist, quoted differences and messages are real."""

import ast
import json
import mmap
import re
import shlex
import subprocess
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import BASE, ROOT, SCRIPTS, ZERO, load_script, run
from test_readme import BLOCK, check_command, check_tool, check_training, logical_lines

PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
WALKTHROUGH, METRICS, TROUBLES = (PAGES[f"{name}.md"] for name in ("walkthrough", "metrics", "troubleshooting"))
CONFIGS = {path.name: json.loads(path.read_text()) for path in sorted((ROOT / "configs").glob("*.json"))}
diffs = load_script("show_diffs.py")


def commands(text: str) -> list[str]:
    blocks = [body for language, body in BLOCK.findall(text) if language == "bash"]
    return list(dict.fromkeys(line for block in blocks for line in logical_lines(block)))


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.*)$", BLOCK.sub("", text), flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """What GitHub makes of headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(text)}


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of any level."""
    return re.split(r"^#+ ", text.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each Markdown table, header and rule left out."""
    found = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split(" |")] for line in table.splitlines()[2:]]
            for table in found]  # fmt: skip


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# Every page
def check_line(line: str) -> None:
    """As in the README, and what only these pages have: a tool under torchrun or behind a shell script of its name,
    Python's own switches, timeit, a pipe."""
    words = shlex.split(line.split(" | ")[0].removesuffix("2>&1"))
    tools = [word for word in words[1:] if re.fullmatch(r"scripts/\w+\.(py|sh)", word)]
    tool = Path(tools[0]).with_suffix(".py") if tools else None
    rest = words[words.index(tools[0]) + 1 :] if tools else []
    if tools[:1] == ["scripts/profile_step.py"]:  # before a training command
        check_tool(*rest[:1], rest[1:]) if tools[1:] else check_training(rest[0], rest[1:])
    elif words[0] in ("torchrun", "bash") and tool and (ROOT / tool).is_file():
        check_tool(str(tool), rest)
    elif words[:3] == ["python", "-m", "timeit"]:
        done = run([sys.executable, *words[1:3], "-r", "1", *words[3:]])
        assert "loops, best of 1" in done.stdout, done.stderr
    elif words[:2] != ["python", "-X"]:
        check_command(line)


@pytest.mark.parametrize(("page", "line"), [(page, line) for page, text in PAGES.items() for line in commands(text)])
def test_every_command_is_one(page, line, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")  # where Python finds what a tool imports from its neighbours
    check_line(line)


@pytest.mark.parametrize(
    "line", ["python scripts/show_diffs.py --paths a", "torchrun scripts/none.py", "python GPTLike-Base.py --stage 2"]
)
def test_a_wrong_command_would_be_found(line):
    with pytest.raises((AssertionError, SystemExit)):
        check_line(line)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", BLOCK.sub("", PAGES[page])):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / "docs" / path).resolve() if path else ROOT / "docs" / page
        assert found.is_relative_to(ROOT) and found.exists(), target
        assert not anchor or anchor in anchors(found.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    """Outside of blocks, whose commands are looked at above. NAME stands for what a user chooses."""
    text = BLOCK.sub("", PAGES[page])
    for name in set(re.findall(r"(?<![\w/.])(?:configs|scripts|tests|docs|examples)/[\w./-]*\w", text)):
        assert "NAME" in name or (ROOT / name).exists(), name
    for name in set(re.findall(r"(?<![\w/.-])(?:GPTLike|DeepSpeed)-[\w-]+\.py\b", text)):
        assert name in SCRIPTS, name


@pytest.mark.parametrize("page", PAGES)
def test_a_page_speaks_of_no_machine(page):
    assert not re.search(r"/work\b|/root\b|/home/|/tmp/", PAGES[page])


# walkthrough.md
def test_quoted_differences_are_the_scripts():
    """After a change: python scripts/show_diffs.py --write docs/walkthrough.md"""
    assert diffs.renewed(WALKTHROUGH) == WALKTHROUGH
    quoted = [shlex.split(match[2]) for match in diffs.QUOTED.finditer(WALKTHROUGH)]
    assert len(quoted) == sum(language == "diff" for language, _ in BLOCK.findall(WALKTHROUGH))
    neighbours = [[load_script(script).PREVIOUS, script] for script in SCRIPTS if script != BASE]
    assert [pair for pair in quoted if ":" not in pair[0]] == neighbours


def test_a_stale_difference_would_be_found():
    assert diffs.renewed(WALKTHROUGH.replace("+ZERO_STAGE = 3", "+ZERO_STAGE = 4")) == WALKTHROUGH


LEDGER = re.compile(r"^  (\w+) on \w+ +([\d,]+) +([\d,]+) = (\d+)P(/N)?$", re.MULTILINE)


def test_the_ledgers_follow_the_formulas():
    """Parameters and optimizer states to 2 %; of gradients and buckets the page says what is held besides. The sums
    are those of the table."""
    wanted = {stage: [(2, stage >= 3), (12, stage >= 1), (2, stage >= 2)] for stage in range(4)}
    blocks = [body for language, body in BLOCK.findall(WALKTHROUGH) if language == "text" and "12P" in body]
    summed = tables(section(WALKTHROUGH, "Does it save memory"))[0]
    assert len(blocks) == 7  # six scripts, and the Offload script's second JSON
    for body, (_, sum_held, share, sum_formula) in zip(blocks, summed, strict=True):
        stage, ranks = (int(re.search(r"ZeRO stage (\d) on (\d) ranks", body)[place]) for place in (1, 2))
        rows = LEDGER.findall(body)
        assert [(int(unit), bool(shared)) for *_, unit, shared in rows] == wanted[stage]
        for kind, held, formula, unit, shared in rows:
            held, formula = (int(number.replace(",", "")) for number in (held, formula))
            assert formula == int(unit) * 13_842_432 // (ranks if shared else 1)
            assert kind == "gradients_and_buckets" or held == pytest.approx(formula, rel=0.02)
        total = sum(int(held.replace(",", "")) for _, held, *_ in rows)
        assert f"{total:,} bytes of model states beside 16P = {16 * 13_842_432:,}" in body
        assert (sum_held, share) == (f"{total:,}", f"{total / 16 / 13_842_432:.2f}")
        assert sum_formula.split(" = ")[0] == f"{sum(int(row[2].replace(',', '')) for row in rows):,}"


def test_deepspeed_has_the_defaults_that_the_page_says():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = DeepSpeedZeroConfig()
    assert zero.use_multi_rank_bucket_allreduce is True and "`use_multi_rank_bucket_allreduce`, true" in WALKTHROUGH
    assert zero.max_reuse_distance == 1e9 and "`stage3_max_reuse_distance`, 1,000,000,000" in WALKTHROUGH
    assert zero.reduce_bucket_size == 5e8 and "defaults are 500,000,000 elements" in WALKTHROUGH


def leaves(config: dict, path: str = "") -> set[str]:
    return {leaf for key, value in config.items() for leaf in
            (leaves(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}"})}  # fmt: skip


def test_every_zero_key_of_the_configs_is_explained():
    found = [spans(cells[0])[0] for cells in tables(section(WALKTHROUGH, "What each key does"))[0]]
    wanted = {key for config in CONFIGS.values() for key in leaves(config["zero_optimization"])}
    assert len(found) == len(set(found)) and set(found) == wanted


# metrics.md
def documented(heading: str, table: int = 0) -> set[str]:
    """The fields of a table, SPLIT being validation and test."""
    names = {name for cells in tables(section(METRICS, heading))[table] for name in spans(cells[0])}
    return {name.replace("SPLIT", split) for name in names for split in ("validation", "test")}


@pytest.fixture(scope="module")
def full(train, tmp_path_factory):
    """A run of Base with all that is optional: a test split, a known peak, the memory report."""
    folder, texts = tmp_path_factory.mktemp("texts"), load_script(BASE).read_texts("sample")
    for split, name in {"train": "train", "validation": "valid", "test": "test"}.items():
        (folder / f"{name}.txt").write_text(texts["train" if split == "train" else "validation"], encoding="utf-8")
    options = {"max_steps": 3, "batch_size": 4, "eval_interval": 2, "peak_tflops": 0.5, "memory_report": True}
    return train(None, dataset=str(folder), precision="bf16", **options)


@pytest.fixture(scope="module")
def ranks(train):
    return train("zero3", precision="bf16", dropout=0, ranks=2, batch_size=4, max_steps=3, memory_report=True)


@pytest.mark.slow
def test_every_field_of_the_metrics_is_documented(full, ranks):
    lines = [json.loads(line) for line in (full.folder / "metrics.jsonl").read_text().splitlines()]
    assert {name for line in lines for name in line} == documented("metrics.jsonl")
    assert full.json("summary").keys() == documented("summary.json")
    assert {kind.split(" on ")[0] for kind in full.json("summary")["ledger"]} == {
        cells[0] for cells in tables(section(METRICS, "summary.json"))[1]
    }
    for one in (full, ranks):
        assert one.json("memory").keys() == documented("memory.json")
        manifest = json.loads((one.folder / "checkpoints" / "step3" / "run.json").read_text())
        assert manifest.keys() == documented("run.json")
        assert manifest["settings"].keys() == documented("run.json", 1)
        assert json.loads((one.folder / "model" / "config.json").read_text()).keys() == documented("config.json")


@pytest.mark.slow
def test_every_added_argument_and_key_is_documented(full, ranks):
    flags = {action.dest for action in load_script(BASE).build_parser()._actions}
    assert full.json("args").keys() - flags == documented("args.json")
    own = set(re.findall(r'add_argument\("--(\w+)"', (ROOT / ZERO["zero3"]).read_text().split("def main()")[1]))
    assert ranks.json("args").keys() - flags - own == documented("args.json")
    config = ranks.json("ds_config")
    assert config.keys() - CONFIGS["zero3.json"].keys() == documented("ds_config.json")
    added = config["optimizer"]["params"].keys() - CONFIGS["zero3.json"]["optimizer"]["params"].keys()
    assert added == {"torch_adam", "fused"} and all(f"`{name}`" in METRICS for name in added)


@pytest.mark.slow
def test_mfu_is_the_formula_of_the_page(full):
    args, count = full.json("args"), full.json("summary")["parameters"]
    flops = 6 * count + 12 * args["n_layer"] * args["d_model"] * args["block_size"]
    assert "6N + 12·L·d·T" in METRICS
    for mfu, rate in zip(full.metrics("mfu"), full.metrics("tokens_per_second"), strict=True):
        assert mfu == pytest.approx(rate * flops / 0.5e12)


# troubleshooting.md
def template(node: ast.AST) -> str:
    """A string as it stands in the code, with a zero byte for each value that it takes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sd]", "\0", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "\0"


def letters(text: str) -> int:
    return sum(map(str.isalpha, text))


@lru_cache
def templates(path: Path) -> list[str]:
    """The strings of a Python file, or the lines of a shell script."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".sh":
        return source.replace("\\\n", "").replace('\\"', '"').splitlines()
    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
    return [template(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


def fits(message: str, text: str) -> bool:
    """Whether a quoted message, ... being what differs from run to run, is a part of this template."""
    return bool(re.search(".*".join(re.escape(part) for part in message.split("...")), text, re.DOTALL))


def is_printed_by(message: str, place: str) -> bool:
    if place == "training scripts":
        return any(is_printed_by(message, script) for script in SCRIPTS)
    package, _, rest = place.partition("/")
    path = ROOT / place if package == "scripts" or place in SCRIPTS else Path(find_spec(package).origin).parent / rest
    if path.suffix != ".so":
        return any(fits(message, text) for text in templates(path))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(message.encode()) >= 0


ROWS = [cells for table in tables(TROUBLES) for cells in table]
QUOTED = [(message, cells[3]) for cells in ROWS if cells[3] not in ("-", "system") for message in spans(cells[0])]


@pytest.mark.parametrize(("message", "place"), QUOTED)
def test_every_quoted_message_is_printed(message, place):
    assert letters(message) >= 6, "too little to be looked for"
    assert is_printed_by(message, place)


@pytest.mark.parametrize(
    ("message", "place"),
    [("--d_model ... is no multiple of --n_head ...", "training scripts"), ("no such message", "scripts/hosts.py"),
     ("connectHalfMesh failed", "torch/lib/libtorch_cpu.so"), ("exits with code ...", "deepspeed/launcher/launch.py")],
)  # fmt: skip
def test_a_wrong_message_would_be_found(message, place):
    assert not is_printed_by(message, place)


def test_the_troubles_are_complete_rows():
    assert len(ROWS) >= 100
    for cells in ROWS:
        assert len(cells) == 4 and all(cells), cells
        assert cells[3] in ("-", "system") or spans(cells[0]), cells


def stops(path: Path) -> set[str]:
    """The messages with which a script ends, as templates: what it raises, and what its *problems() collect."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = getattr(node, "func", None) and (getattr(node.func, "id", "") or getattr(node.func, "attr", ""))
        if name in ("UserError", "LoneError", "end_alone", "error", "stop") and node.args:
            found.append(node.args[0])
        if isinstance(node, ast.FunctionDef) and node.name.endswith("problems"):
            for part in ast.walk(node):
                if isinstance(part, ast.Call) and getattr(part.func, "attr", "") == "append":
                    found.append(part.args[0])
                if isinstance(part, ast.Return):
                    found += [item for each in ast.walk(part) if isinstance(each, ast.List) for item in each.elts]
    return {text for text in map(template, found) if letters(text) > 8}


@pytest.mark.parametrize("path", [*SCRIPTS, "scripts/hosts.py"])
def test_every_message_that_stops_a_run_has_a_row(path):
    found = stops(ROOT / path)
    assert len(found) >= 15
    assert [text for text in found if not any(fits(message, text) for message, _ in QUOTED)] == []


# scripts/show_diffs.py
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "write OLD and NEW, or --write PAGE"),
        ([BASE], 2, "write OLD and NEW, or --write PAGE"),
        ([BASE, BASE, "--write", "docs/walkthrough.md"], 2, "write OLD and NEW, or --write PAGE"),
        ([f"{BASE}:train", BASE], 2, "write NAME after both scripts or after none"),
        ([BASE, "--wri", "x"], 2, "unrecognized arguments: --wri"),
        ([BASE, "none.py"], 1, "No such file or directory"),
        ([BASE, "docs"], 1, "Is a directory"),
        ([BASE, "README.md"], 1, "README.md is not Python"),
        ([f"{BASE}:none", f"{BASE}:train"], 1, f"{BASE} has no none"),
        ([f"{BASE}:train.none", f"{BASE}:train"], 1, f"{BASE} has no train.none"),
        ([f"{BASE}:VERSION", f"{BASE}:train"], 1, f"{BASE} has no VERSION"),
        (["--write", "docs/none.md"], 1, "No such file or directory"),
    ],
)
def test_bad_input_of_show_diffs(words, code, message):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "show_diffs.py", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr and "Traceback" not in done.stderr


def test_equal_scripts_have_no_difference():
    assert diffs.difference(BASE, BASE) == ""


def test_a_definition_without_successor_is_one_line():
    text = diffs.difference(BASE, ZERO["zero1"])
    assert "-class PlainRun: ...\n" in text and "def __init__" not in text
    assert "+# region engine-run: ...\n" in text and "+def build_engine(" in text and "import" not in text
