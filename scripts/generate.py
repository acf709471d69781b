"""Text from an exported model, by transformers' generate().

Run:
    python scripts/export_hf.py runs/DeepSpeed-GPTLike-ZeRO-2 gpt2-wikitext2
    python scripts/generate.py gpt2-wikitext2 --prompt "The first" --max_new_tokens 80 --temperature 0.8 --top_p 0.95
    python scripts/generate.py gpt2-wikitext2 < prompts.txt

Prints the prompt and its continuation, and nothing else, to stdout: on a terminal as it comes, else when it is done.
Without --prompt each line of standard input is one; texts of several prompts stand apart by an empty line. Each prompt
begins with the same seed, so that its text is the one it has alone.
Exit code 0: fine, 1: no exported model, or a prompt that leaves no room, 2: wrong usage.

Source: https://huggingface.co/docs/transformers/main_classes/text_generation
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers looks for DeepSpeed, which would warn where no GPU is
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextStreamer, logging

READ = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}  # how tokens become text again


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("model", metavar="EXPORTED_DIR", type=Path, help="what export_hf.py has written")
    add("--prompt", help="text to continue; left out: each line of standard input is one")
    add("--max_new_tokens", type=int, default=60, help="length of the continuation in tokens (default: 60)")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    add("--top_k", type=int, default=50, help="sample among so many likeliest tokens; 0: among all (default: 50)")
    add("--top_p", type=float, default=1.0, help="sample among the likeliest tokens that together are so probable "
        "(default: 1.0, all)")  # fmt: skip
    add("--seed", type=int, default=42, help="of sampling: the same seed gives the same text (default: 42)")
    return parser


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        parser.error("the following arguments are required: --prompt, or prompts on standard input, one a line")
    if args.prompt is not None:
        if not args.prompt:
            parser.error("--prompt is empty: write at least a word")
        if any("\ud800" <= character <= "\udfff" for character in args.prompt):  # bytes that Python could not decode
            parser.error("--prompt is not UTF-8")
    for name, least in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
        if not least <= (value := getattr(args, name)) < 2**31:
            parser.error(f"--{name} {value}: must be {'below 2**31' if value >= 2**31 else f'at least {least}'}")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top_p {args.top_p}: must be above 0 and at most 1")


def read_prompts(lines: Iterator[bytes]) -> Iterator[tuple[str, str]]:
    """(where it stands, prompt) of each line that is not blank, as it comes. Raises ValueError where there is none."""
    number = found = 0
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input, line {number} is not UTF-8: {error}") from error
        if text.strip():
            found += 1
            yield f"standard input, line {number}: ", text
    if not found:
        raise ValueError(f"standard input has no prompt in its {number} lines: write one a line, or --prompt")


def load(folder: Path) -> tuple[PreTrainedModel, AutoTokenizer]:
    if not all((folder / name).is_file() for name in ("config.json", "generation_config.json", "tokenizer.json")):
        raise ValueError(f"{folder} is no exported model: run scripts/export_hf.py RUN_DIR {folder} first")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "auto" if device.type == "cuda" else torch.float32  # many CPUs have no fast bf16
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval(), tokenizer
    except Exception as error:  # transformers and tokenizers raise nothing narrower
        raise ValueError(f"cannot read {folder}: {(str(error) or repr(error)).splitlines()[0]}") from error


def generate(
    model: PreTrainedModel, tokenizer: AutoTokenizer, prompt: str, args: argparse.Namespace, *, stream: bool = False
) -> str:
    """The prompt with its continuation, with stream printed as it comes. Raises ValueError where it is too long."""
    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    room = model.config.n_positions - given["input_ids"].shape[1]
    if args.max_new_tokens > room:
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens}: of the model's {model.config.n_positions} positions this prompt "
            f"leaves {max(room, 0)}"
        )
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    torch.manual_seed(args.seed)
    tokens = model.generate(
        **given,
        max_new_tokens=args.max_new_tokens,
        suppress_tokens=list(range(len(tokenizer), model.config.vocab_size)) or None,  # padding rows: no tokens
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, **READ) if stream else None,
        **(sampling if args.temperature > 0 else {"do_sample": False}),
    )
    return tokenizer.decode(tokens[0], **READ)


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    check_args(parser, args)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    stream, where = sys.stdout.isatty(), ""
    try:
        model, tokenizer = load(args.model)
        prompts = [("", args.prompt)] if args.prompt is not None else read_prompts(sys.stdin.buffer)
        for number, (where, prompt) in enumerate(prompts):
            if number:
                print()
            text = generate(model, tokenizer, prompt, args, stream=stream)
            if not stream:
                print(text, flush=True)
            where = ""
    except (OSError, ValueError) as error:
        sys.exit(f"generate.py: error: {where}{error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    main()
