"""This GPT under DeepSpeed-Inference: an exported model in deepspeed.init_inference, beside transformers alone.

init_inference puts the model into an engine. For models that it knows it divides the matrices among ranks (tensor
parallelism) or takes kernels of its own. Neither holds for a GPT-2 here: deepspeed 0.19.8 does not divide it ("AutoTP
not supported for model"), and its kernels' layers return tuples, which transformers 5 does not take. So the model runs
as it is, on one rank, and this shows that nothing has changed: equal logits and equal text.

Run, after scripts/tools/export_hf.py RUN OUT:
    python examples/inference.py OUT --prompt "The first"

Source: DeepSpeed-Inference, arXiv:2207.00032; https://www.deepspeed.ai/tutorials/inference-tutorial/
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts" / "tools"))
from common import ToolError, cpu_default, exit_with
from generate import load

cpu_default()
import deepspeed  # noqa: E402


@torch.no_grad()
def measure(model, tokens, new_tokens, pad):
    """Logits of the prompt, the tokens of a greedy continuation, and how many of them a second."""
    logits = model(tokens).logits.cpu()
    model.generate(tokens, do_sample=False, max_new_tokens=2, pad_token_id=pad)  # warm-up
    start = time.perf_counter()
    text = model.generate(
        tokens, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=pad
    )
    return logits, text[0].cpu(), new_tokens / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="EXPORTED_DIR", type=Path, help="what export_hf.py has written")
    parser.add_argument("--prompt", default="The first", help="text to continue (The first)")
    parser.add_argument("--max_new_tokens", type=int, default=60, help="length of the continuation (60)")
    args = parser.parse_args()
    try:
        model, tokenizer = load(args.model)
    except ToolError as error:
        exit_with(error)
    tokens = tokenizer(args.prompt, return_tensors="pt").input_ids.to(model.device)
    room = model.config.n_positions - tokens.shape[1]
    if not 0 < args.max_new_tokens <= room:
        parser.error(f"--max_new_tokens {args.max_new_tokens}: the prompt leaves {room} of the model's positions")
    logits, text, rate = measure(model, tokens, args.max_new_tokens, tokenizer.eos_token_id)
    engine = deepspeed.init_inference(model, tensor_parallel={"tp_size": 1}, dtype=model.dtype)
    own_logits, own_text, own_rate = measure(engine, tokens, args.max_new_tokens, tokenizer.eos_token_id)
    print(f"transformers:        {rate:.1f} tokens/s")
    apart = (own_logits - logits).abs().max().item()
    equal = "equal" if own_text.equal(text) else "NOT equal"
    print(f"DeepSpeed-Inference: {own_rate:.1f} tokens/s, {own_rate / rate:.2f}x")
    print(f"logits differ by {apart:.1e} at most; the text is {equal}")
    print(tokenizer.decode(own_text, skip_special_tokens=True, clean_up_tokenization_spaces=False))


if __name__ == "__main__":
    main()
