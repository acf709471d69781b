"""Text from an exported model, by transformers' generate().

Run:
    python scripts/tools/generate.py gpt2-wikitext2 --prompt "The first" --max_new_tokens 80 --temperature 0.8
    python scripts/tools/generate.py gpt2-wikitext2 < prompts.txt

Prints the prompt and its continuation, and nothing else, to stdout: on a terminal as it comes, else when it is done.
Without --prompt each line of standard input is one; texts of several prompts stand apart by an empty line. Each prompt
begins with the same seed, so that its text is the one it has alone.
Exit code 0: fine, 1: no exported model, or a prompt that leaves no room, 2: wrong usage.
Source: https://huggingface.co/docs/transformers/main_classes/text_generation
"""

import argparse
import signal
import sys
from pathlib import Path

import safetensors
import torch
from common import ToolError, cpu_default, exit_with

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
    add("--top_p", type=float, default=1.0, help="the likeliest tokens that are together so probable (default: 1.0)")
    add("--seed", type=int, default=42, help="of sampling: the same seed gives the same text (default: 42)")
    return parser


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        parser.error("the following arguments are required: --prompt, or prompts on standard input, one a line")
    if args.prompt == "":
        parser.error("--prompt is empty: write at least a word")
    for name, least in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
        if not least <= getattr(args, name) < 2**31:
            parser.error(f"--{name} {getattr(args, name)}: must be at least {least} and below 2**31")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top_p {args.top_p}: must be above 0 and at most 1")


def load(folder: Path) -> tuple:
    """The model, on the GPU where there is one, and its tokenizer."""
    cpu_default()
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not all((folder / name).is_file() for name in ("config.json", "generation_config.json", "tokenizer.json")):
        raise ToolError(f"{folder} is no exported model: run scripts/tools/export_hf.py RUN {folder} first")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "auto" if device == "cuda" else torch.float32  # many CPUs have no fast bf16
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        return model, AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, KeyError, safetensors.SafetensorError) as error:
        raise ToolError(f"cannot read {folder}: {(str(error) or repr(error)).splitlines()[0]}") from error


def continue_text(model: object, tokenizer: object, prompt: str, args: argparse.Namespace, *, streamer: object) -> str:
    """The prompt with its continuation. Raises ToolError where the prompt leaves too little room."""
    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    room = model.config.n_positions - given["input_ids"].shape[1]
    if args.max_new_tokens > room:
        left = f"of the model's {model.config.n_positions} positions {prompt!r:.40} leaves {max(room, 0)}"
        raise ToolError(f"--max_new_tokens {args.max_new_tokens}: {left}")
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    torch.manual_seed(args.seed)
    how = sampling if args.temperature > 0 else {"do_sample": False}
    how |= {"max_new_tokens": args.max_new_tokens, "pad_token_id": tokenizer.eos_token_id}
    tokens = model.generate(**given, **how, streamer=streamer)
    return tokenizer.decode(tokens[0], **READ)


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    check_args(parser, args)
    try:
        prompts = [args.prompt] if args.prompt else [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
        if not prompts:
            raise ToolError("standard input has no prompt: write one a line, or --prompt")
        model, tokenizer = load(args.model)
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, **READ) if sys.stdout.isatty() else None
        for number, prompt in enumerate(prompts):
            text = continue_text(model, tokenizer, prompt, args, streamer=streamer)
            if streamer is None:
                print(text if number == 0 else f"\n{text}", flush=True)
    except (ToolError, UnicodeError) as error:
        exit_with(error)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    main()
