"""Text from an exported model, by transformers' generate().

    python scripts/tools/generate.py gpt2-wikitext2 --prompt "The first" --max_new_tokens 80 --temperature 0.8

Prints the prompt and its continuation, and nothing else, to stdout: on a terminal as it comes, else when it is done.
Exit code 0: fine, 1: no exported model, or a prompt that leaves no room, 2: wrong usage.
Source: https://huggingface.co/docs/transformers/main_classes/text_generation
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import safetensors
import torch
from common import ToolError, cpu_default, exit_with


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("model", metavar="EXPORTED_DIR", type=Path, help="what export_hf.py has written")
    add("--prompt", required=True, help="text to continue")
    add("--max_new_tokens", type=int, help="length of the continuation in tokens (60, or what the model has room for)")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    add("--top_k", type=int, default=50, help="sample among so many likeliest tokens; 0: among all (default: 50)")
    add("--seed", type=int, default=42, help="of sampling: the same seed gives the same text (default: 42)")
    args = parser.parse_args()
    if not args.prompt:
        parser.error("--prompt is empty: write at least a word")
    for name, least in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
        if getattr(args, name) is not None and not least <= getattr(args, name) < 2**31:
            parser.error(f"--{name} {getattr(args, name)}: must be at least {least} and below 2**31")
    return args


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


def main() -> None:
    args = parse_args()
    try:
        model, tokenizer = load(args.model)
        from transformers import TextStreamer

        given, positions = tokenizer(args.prompt, return_tensors="pt").to(model.device), model.config.n_positions
        room = max(positions - given["input_ids"].shape[1], 0)
        count = args.max_new_tokens or min(60, max(1, room))
        if count > room:
            raise ToolError(f"--max_new_tokens {count}: of {positions} positions {args.prompt!r:.40} leaves {room}")
        how = {"max_new_tokens": count, "pad_token_id": tokenizer.eos_token_id, "do_sample": False}
        if args.temperature > 0:
            how |= {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k}
        read = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        streamer = TextStreamer(tokenizer, **read) if sys.stdout.isatty() else None
        torch.manual_seed(args.seed)
        tokens = model.generate(**given, **how, streamer=streamer)
        if streamer is None:
            print(tokenizer.decode(tokens[0], **read))
    except (ToolError, UnicodeError) as error:
        exit_with(error)


if __name__ == "__main__":
    main()
