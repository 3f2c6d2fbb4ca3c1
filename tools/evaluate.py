"""The loss of a trained model on text: python -m tools.evaluate OUT_DIR --text FILE

For tasks such as LAMBADA, see docs/hugging-face.md.
"""

import math
from argparse import ArgumentParser

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.command import UserError, command
from data.text import READ, UNPACK
from data.tokenizer import encode_to_numpy
from tools import Trained, expanded, load_trained, positive

LARGEST_EXPONENT = 709  # the result of a larger one is no float


@torch.no_grad()
def judge_text(trained: Trained, text: bytes, context_length: int) -> dict[str, float]:
    """Name of a metric -> its value, over all bytes of the text.

    The first token is predicted from <|endoftext|>. Windows have context_length tokens.
    The last window overlaps the one before, so that it is as long, but only its new
    tokens count (as in lm-eval's `loglikelihood_rolling`). Raises UserError if the loss
    is not finite.
    """
    model = trained.model
    tokens = encode_to_numpy(trained.tokenizer, text).tolist()
    n_tokens = len(tokens)
    tokens = [trained.tokenizer.eot_token, *tokens]
    tokens = torch.tensor(tokens, device=model.embed.weight.device)
    starts = range(0, n_tokens, context_length)
    nats = 0.0
    for start in tqdm(starts, leave=False, disable=None):  # shown only on a terminal
        end = min(start + context_length, n_tokens)
        window = tokens[max(0, end - context_length) : end]
        n_new = end - start
        logits = model(window[None])[0, -n_new:]  # (n_new, vocab_size)
        targets = tokens[start + 1 : end + 1]
        nats += F.cross_entropy(logits.float(), targets, reduction="sum").item()
    if math.isnan(nats):
        question = "has its training diverged?"
        raise UserError(f"the loss of the model is not finite: {question}")
    loss = nats / n_tokens
    return {
        "nats per token": loss,
        "perplexity per token": math.exp(loss) if loss < LARGEST_EXPONENT else math.inf,
        "bits per byte": nats / math.log(2) / len(text),
    }


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("out_dir", type=expanded)
    add("--text", type=expanded, nargs="+", required=True, metavar="FILE")
    add("--context_length", type=positive, help="of windows; default: the model's")
    args = parser.parse_args(argv)
    not_plain = {*READ, *UNPACK} - {".txt"}
    for file in args.text:
        if file.suffix.lower() in not_plain:
            raise UserError(f"{file}: give its text alone, as a .txt")
    trained = load_trained(args.out_dir)
    longest = trained.model.config.context_length
    context_length = args.context_length or longest
    if context_length > longest:
        problem = f"this model takes at most {longest} tokens"
        raise UserError(f"--context_length {context_length}: {problem}")
    print(f"| text | bytes | metric, with {context_length} tokens of context | value |")
    print("| --- | --- | --- | --- |")
    for file in args.text:
        text = file.read_bytes()
        if not text:
            raise UserError(f"{file}: is empty")
        for metric, value in judge_text(trained, text, context_length).items():
            print(f"| {file.name} | {len(text):,} | {metric} | {value:.4f} |")


if __name__ == "__main__":
    raise SystemExit(main())
