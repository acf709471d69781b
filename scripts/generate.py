"""Text from an exported model.

Run:
    python scripts/export_hf.py runs/DeepSpeed-GPTLike-ZeRO-2 gpt2-wikitext2
    python scripts/generate.py gpt2-wikitext2 --prompt "The first" --max_new_tokens 80 --temperature 0.8

Prints the prompt and its continuation, and nothing else, to stdout.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="EXPORTED_DIR", type=Path, help="what export_hf.py has written")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=60, help="length of the continuation in tokens")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top_k", type=int, default=50, help="sample among this many likeliest tokens; 0: among all")
    parser.add_argument("--seed", type=int, default=42, help="of sampling: the same seed gives the same text")
    return parser


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not args.prompt:
        parser.error("--prompt is empty: write at least a word")
    if any("\ud800" <= character <= "\udfff" for character in args.prompt):  # bytes that Python could not decode
        parser.error("--prompt is not UTF-8")
    for name, least in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
        if not least <= (value := getattr(args, name)) < 2**31:
            parser.error(f"--{name} {value}: must be {'below 2**31' if value >= 2**31 else f'at least {least}'}")


def generate(args: argparse.Namespace) -> str:
    """The prompt with its continuation. Raises ValueError where the folder is no export or the text too long."""
    if not all((args.model / name).is_file() for name in ("config.json", "generation_config.json", "tokenizer.json")):
        raise ValueError(f"{args.model} is no exported model: run scripts/export_hf.py RUN_DIR {args.model} first")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "auto" if device.type == "cuda" else torch.float32  # many CPUs have no fast bf16
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    except Exception as error:
        raise ValueError(f"cannot read {args.model}: {(str(error) or repr(error)).splitlines()[0]}") from error
    prompt = tokenizer(args.prompt, return_tensors="pt").to(device)
    room = model.config.n_positions - prompt["input_ids"].shape[1]
    if args.max_new_tokens > room:
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens}: of the model's {model.config.n_positions} positions this prompt "
            f"leaves {max(room, 0)}"
        )
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k}
    torch.manual_seed(args.seed)
    tokens = model.generate(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        max_new_tokens=args.max_new_tokens,
        suppress_tokens=list(range(len(tokenizer), model.config.vocab_size)) or None,  # padding rows: no tokens
        pad_token_id=tokenizer.eos_token_id,
        **(sampling if args.temperature > 0 else {"do_sample": False}),
    )
    return tokenizer.decode(tokens[0])


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    check_args(parser, args)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        text = generate(args)
    except (OSError, ValueError) as error:
        sys.exit(f"generate.py: error: {error}")
    print(text)


if __name__ == "__main__":
    main()
