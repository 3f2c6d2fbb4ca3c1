"""The loss of a trained model on your own text: python -m tools.evaluate OUT_DIR --text FILE ...

OUT_DIR: of a run, or a Hugging Face one. For tasks such as LAMBADA: docs/hugging-face.md."""

import math
from argparse import ArgumentParser

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.command import UserError, command
from data.text import READ, UNPACK
from data.tokenizer import encode_to_numpy
from tools import Trained, expanded, load_trained, positive


@torch.no_grad()
def judge_text(trained: Trained, text: bytes, T: int) -> dict[str, float]:
    """Metric -> value. Every byte is predicted: the first token follows <|endoftext|>.

    Windows have T tokens. The last one starts earlier, to be as long, but only its new tokens count
    (as in lm-eval's `loglikelihood_rolling`)."""
    model = trained.model
    ids = [trained.tokenizer.eot_token, *encode_to_numpy(trained.tokenizer, text).tolist()]
    tokens = torch.tensor(ids, device=model.embed.weight.device)
    n, nats = len(tokens) - 1, 0.0  # n are predicted
    for start in tqdm(range(0, n, T), leave=False, disable=None):  # on a terminal
        end = min(start + T, n)
        logits = model(tokens[max(0, end - T) : end][None])[0, start - end :]  # (new, vocab_size)
        nats += F.cross_entropy(logits.float(), tokens[start + 1 : end + 1], reduction="sum").item()
    if math.isnan(nats):
        raise UserError("the loss of the model is not finite: has its training diverged?")
    perplexity = math.exp(nats / n) if nats / n < 709 else math.inf  # past the largest float
    metrics = {"nats per token": nats / n, "perplexity per token": perplexity}
    return metrics | {"bits per byte": nats / math.log(2) / len(text)}


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=expanded)
    parser.add_argument("--text", type=expanded, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--context_length", type=positive, help="of windows; default: the model's")
    args = parser.parse_args(argv)
    if wrong := [f for f in args.text if f.suffix.lower() in {*READ, *UNPACK} - {".txt"}]:
        raise UserError(f"{wrong[0]}: give its text alone, as a .txt")
    trained = load_trained(args.out_dir)
    most = trained.model.config.context_length
    if (T := args.context_length or most) > most:
        raise UserError(f"--context_length {T}: this model takes at most {most} tokens")
    print(f"| text | bytes | metric, with {T} tokens of context | value |\n|{' --- |' * 4}")
    for file in args.text:
        if not (text := file.read_bytes()):
            raise UserError(f"{file}: is empty")
        for metric, value in judge_text(trained, text, T).items():
            print(f"| {file.name} | {len(text):,} | {metric} | {value:.4f} |")


if __name__ == "__main__":
    raise SystemExit(main())
