"""README.md and the scripts' docstrings are true: commands parse, files exist, tables and quotations are the code's."""

import contextlib
import inspect
import io
import json
import re
import shlex
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
from conftest import BASE, ROOT, SCRIPTS, load_script

README = (ROOT / "README.md").read_text(encoding="utf-8")
OTHER_WORDS = ("export", "cd", "git", "source", "conda", "pip", "ssh")  # their arguments are not ours to check
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(README) if found == language]


def logical_lines(text: str) -> list[str]:
    """Lines without comments and blank ones, continued lines joined."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def docstring_commands(script: str) -> list[str]:
    """What stands indented by four after the docstring's "Run"."""
    text = load_script(script).__doc__
    run = text[text.index("\nRun") :].replace("\\\n", " ")
    return [line.strip() for line in run.splitlines() if line.startswith("    ")]


def rows(heading: str, table: int = 0) -> list[list[str]]:
    """The cells of a Markdown table (header and rule left out) under a heading."""
    section = re.split(r"^#+ ", README.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in tables[table].splitlines()[2:]]


# (a) commands
@lru_cache
def deepspeed_launcher():
    from deepspeed.launcher import runner

    return runner


def check_training(script: str, words: list[str]) -> None:
    assert script in SCRIPTS, f"no such script: {script}"
    module = load_script(script)
    parser = module.build_parser()
    if script != BASE:
        parser.add_argument("--ds_config", default=module.DEFAULT_DS_CONFIG)
    args = parser.parse_args(words)
    module.check_args(parser, args)
    if script != BASE:
        assert (ROOT / args.ds_config).is_file(), args.ds_config
        problems = module.stage_problems(module.read_json(str(ROOT / args.ds_config)))
        assert [problem for problem in problems if "nvme_path" not in problem] == []


def check_tool(path: str, words: list[str]) -> None:
    """A Python tool of scripts/: its parser takes the words, or where that is out of reach its help names the flags."""
    assert re.fullmatch(r"scripts/\w+\.py", path) and (ROOT / path).is_file(), path
    module = load_script(Path(path).name)
    if hasattr(module, "build_parser") and not inspect.signature(module.build_parser).parameters:
        module.build_parser().parse_args(words)
        return
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setattr("sys.argv", [path, "--help"])
        with pytest.raises(SystemExit) as stop:
            module.main()
    assert stop.value.code == 0
    known = re.findall(r"--\w+", shown.getvalue())
    assert all(word in known for word in words if word.startswith("--")), f"{path} knows only {known}"


def load_drills() -> list[str]:
    """The names that rehearse_multihost.sh knows."""
    text = (ROOT / "scripts" / "rehearse_multihost.sh").read_text()
    return re.search(r"^DRILLS=\((.*)\)$", text, re.MULTILINE)[1].split()


def check_shell(path: str, words: list[str]) -> None:
    assert re.fullmatch(r"scripts/\w+\.sh", path) and (ROOT / path).is_file(), path
    source, flags = (ROOT / path).read_text(), {"--launcher": 1, "--hostfile": 1, "--max-restarts": 1}
    if path in ("scripts/run_multihost.sh", "scripts/run_slurm.sh"):
        while words[0].startswith("-"):
            assert words[0] in source, f"{path} knows no {words[0]}"
            words = words[1 + flags.get(words[0], 0) :]
        check_training(words[0], words[1:])
    elif path in ("scripts/check_env.sh", "scripts/rehearse_multihost.sh"):
        assert all(word in source for word in words if word.startswith("-")), f"{path}: {words}"
        assert words[:1] != ["--drill"] or words[1] in [*load_drills(), "all"]
    elif path == "scripts/run_local.sh":
        words = words[1:] if words[0] == "--dry_run" else words
        check_training(words[0], words[1:])
    elif path == "scripts/quickstart.sh":
        check_training("DeepSpeed-GPTLike-ZeRO-2.py", words[1:] if words[:1] == ["--dry_run"] else words)
    else:
        for word in words:
            assert word in source or (ROOT / word).exists(), f"{path} knows no {word}"


def check_command(line: str) -> None:
    words = shlex.split(line)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    first, words = words[0], words[1:]
    if first == "python" and words[0].startswith("scripts/"):
        check_tool(words[0], words[1:])
    elif first == "python":
        check_training(words[0], words[1:])
    elif first == "deepspeed":
        args = deepspeed_launcher().parse_args(words)
        check_training(args.user_script, args.user_args)
    elif first == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(words)
        check_training(args.training_script, args.training_script_args)
    elif first == "bash":
        check_shell(words[0], words[1:])
    elif first == "sbatch":
        check_shell("scripts/run_slurm.sh", words[words.index("scripts/run_slurm.sh") + 1 :])
    elif first == "diff":
        assert len(words) == 2 and set(words) <= set(SCRIPTS)
    else:
        assert first in OTHER_WORDS, f"unknown command: {first}"


@pytest.mark.parametrize("line", dict.fromkeys(line for block in blocks("bash") for line in logical_lines(block)))
def test_every_command_of_the_readme_is_one(line):
    check_command(line)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_of_a_docstring_is_one(script):
    commands = docstring_commands(script)
    assert commands and any(script in line for line in commands)
    for line in commands:
        check_command(line)


@pytest.mark.parametrize(
    "line",
    ["deepspeed --log_dir logs GPTLike-Base.py", "torchrun --nproc 2 none.py", "python GPTLike-Base.py --n_layers 2",
     "deepspeed DeepSpeed-GPTLike-ZeRO-2.py --ds_config configs/zero3.json", "bash scripts/none.sh", "nc -zv host 1",
     "python GPTLike-Base.py --d_model 100", "bash scripts/test.sh --quick", "python scripts/parity.py --ranks 4",
     "python scripts/compare_runs.py runs/a --out b"],
)  # fmt: skip
def test_a_wrong_command_would_be_found(line):
    with pytest.raises((AssertionError, SystemExit)):
        check_command(line)


# (b), (g) files
def test_links_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            assert (ROOT / path).resolve().is_relative_to(ROOT) and (ROOT / path).exists(), target
            assert not anchor or path or anchor in anchors, target


def test_files_that_the_readme_names_exist():
    for name in set(re.findall(r"(?<![\w/.])(?:configs|scripts|tests|docs)/[\w./-]*\w", README)):
        assert (ROOT / name).exists(), name
    for name in set(re.findall(r"(?<![\w/.-])[\w-]+\.(?:py|sh|md|toml)\b", README)):
        assert any((ROOT / folder / name).is_file() for folder in (".", "scripts", "tests", "docs")), name


# (c), (d) tables
def test_the_flags_table_is_the_parsers():
    module = load_script(BASE)
    wanted = {"--ds_config": "the script's own", "--rendezvous_timeout": "300", "--stall_timeout": "600"}
    wanted["--verbose"] = "off"
    for action in module.build_parser()._actions[2:]:  # the first are --help and --version
        if action.dest in module.DEFAULTS:
            default = f"JSON: {module.DEFAULTS[action.dest]}"
        elif action.nargs == 0:
            default = "off"
        else:
            default = "none" if action.default is None else str(action.default)
        wanted[action.option_strings[0]] = default.replace(f"runs/{Path(BASE).stem}", "runs/SCRIPT")
    found = {cells[0].strip("`"): cells[1].strip("`") for cells in rows("Flags")}
    assert found == wanted
    assert "{bf16,fp16,fp32}" in README


def leaves(section: dict, path: str = "") -> dict[str, object]:
    found = {}
    for key, value in section.items():
        found |= leaves(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


@pytest.mark.parametrize("heading", ["One host", "Between hosts"])
def test_troubles_are_shown_where_the_table_says(heading):
    """A row names a drill, or a test file that holds most words of its symptom; else it says that nothing shows it."""
    table, shown = rows(heading), 0
    for symptom, _, _, place in table:
        shown += place != "not shown"
        if place.startswith("tests/"):
            words, source = re.findall(r"[A-Za-z_]{3,}", symptom), (ROOT / place).read_text()
            assert sum(word in source for word in words) >= len(words) / 2, f"{place} does not show: {symptom}"
        elif place != "not shown":
            assert place.removeprefix("drill ") in load_drills()
    assert len(table) >= 20 and shown >= 17


def test_the_config_keys_table_is_that_of_the_files():
    wanted: dict[str, set[str]] = {}
    for path in sorted((ROOT / "configs").glob("*.json")):
        for key, value in leaves(json.loads(path.read_text())).items():
            wanted.setdefault(key, set()).add(json.dumps(value))
    found = {cells[0].strip("`"): cells[1].strip("`") for cells in rows("Config keys")}
    assert found == {key: " or ".join(sorted(values)) for key, values in wanted.items()}


def test_the_metrics_table_names_every_field():
    module = load_script(BASE)
    source = (ROOT / BASE).read_text()
    wanted = {*module.FORMATS, "loss"} | {f"SPLIT_{name}" for name in re.findall(r'f"\{split\}_(\w+)":', source)}
    assert {cells[0].strip("`") for cells in rows("Metrics")} == wanted


# (e) quoted differences
def test_quoted_diff_lines_are_real():
    command, checked = "", 0
    for language, body in BLOCK.findall(README):
        for line in logical_lines(body) if language == "bash" else ():
            command = line if line.startswith("diff ") else command
        if language == "diff":
            words = ["diff", *(str(ROOT / name) for name in command.split()[1:])]
            real = iter(subprocess.run(words, capture_output=True, text=True).stdout.splitlines())
            quoted = body.splitlines()
            assert 3 <= len(quoted) <= 15
            for line in quoted:
                assert line in real, f"{command} has no line {line}"  # `in` moves on: the order counts
            checked += 1
    assert checked == 5


# (f) figures
def test_the_parity_table_has_a_row_for_each_script():
    found = {cells[0].strip("`"): cells for cells in rows("Parity")}
    assert list(found) == SCRIPTS
    for script, (_, ranks, apart, *losses) in found.items():
        assert (int(ranks), apart) == (1, "-") if script == BASE else (int(ranks) == 2 and 0 <= float(apart) < 1e-5)
        assert all(5 < float(loss) < 8 for loss in losses)
    assert "python scripts/parity.py\n" in README


def test_the_ledger_table_follows_the_formulas():
    units = {BASE: (2, 2, 12), "ZeRO-1": (2, 2, 6), "ZeRO-3": (1, 1, 6)}  # times P; at two ranks
    for script, _, *cells in rows("Ledger"):
        parameters, gradients, states = next((u for name, u in units.items() if name in script), (2, 1, 6))
        for cell, unit in zip(cells, (parameters, gradients, states), strict=True):
            assert int(cell.split(" / ")[1].replace(",", "")) == unit * 167_680
    assert [cells[0].strip("`") for cells in rows("Ledger")] == SCRIPTS
    assert "python scripts/parity.py --precision bf16\n" in README


def test_the_readme_stands_alone():
    assert not re.search(r"/work\b|/root\b|/home/|/tmp/|(?<!\.)\.\./", README)
