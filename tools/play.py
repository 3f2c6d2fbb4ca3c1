"""A trained GPT to prune by hand in a browser: python -m tools.play OUT_DIR [OTHER]

Writes OUT_DIR/play.html, one file that holds the weights, their scores, the words and a
passage that the model was not trained on. OTHER: a run of the same model that pruned
its neurons during training. The page marks its loss, to compare with cuts by hand.
"""

import base64
import json
import math
from argparse import ArgumentParser
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from configs import Config, load_config
from data.command import UserError, command, write_whole
from data.loader import TokenDataset
from data.tokenizer import all_tokens
from model import GPT
from prune import Pruner, choose, slice_group
from tools import expanded, load_trained, read_log

FRAME = Path(__file__).with_name("play.html")
MARK = "/*NET*/"  # in the frame: here goes the data
PASSAGE_TOKENS = 512  # a browser computes their loss in 50 ms
LARGEST = 2**20  # parameters: one second of computing, and a file of 3 MB
SENTENCE_ENDS = (b".", b"")  # b"" is <|endoftext|>


def starts_of(words: list[bytes], n_words: int) -> list[int]:
    """Up to 100 places where a passage of n_words may begin.

    It begins with a sentence, if one fits, and lies inside one ASCII text, if one does.
    """
    fitting = range(1, len(words) - n_words + 1)
    sentences = []
    inside_a_text = []
    for start in fitting:
        is_capital = words[start][1:2].isupper()  # after the space
        if words[start - 1] not in SENTENCE_ENDS or not is_capital:
            continue
        sentences.append(start)
        passage = words[start : start + n_words]
        if all(word and word.isascii() for word in passage):
            inside_a_text.append(start)
    starts = inside_a_text or sentences or fitting
    every = max(1, math.ceil(len(starts) / 100))
    return list(starts[::every])


def scores_of(model: GPT, data: TokenDataset, beta: float) -> dict[str, Tensor]:
    """Group -> the score of each neuron, from 40 batches of training text."""
    pruner = Pruner("sensitivity", beta, {"d_ff"}, seed=1)
    for step in range(1, 41):
        model.zero_grad()
        inputs, targets = data.batch(step, 16, seed=1)
        model(inputs, targets).backward()
        pruner.score(model)
    return pruner.scores


def cut_in_half(model: GPT, scores: dict[str, Tensor]) -> GPT:
    """A copy of the model without the neurons of lowest score, half in each layer."""
    half = deepcopy(model)
    for group in model.groups():
        if group.kind == "d_ff":
            n_keep = math.ceil(group.width / 2)
            slice_group(half, [], group, choose(scores[group.name], n_keep))
    return half


def load_cut(other: Path, config: Config, model: GPT) -> GPT | None:
    """The model of `other`, if it is this model, cut in steps as it trained."""
    other_config, _ = load_config(str(other))
    if other_config.prune_schedule != "cubic":
        return None
    cut = load_trained(other).model.cpu()
    same_data = other_config.data_dir == config.data_dir
    same_shape = replace(cut.config, d_ff=model.config.d_ff) == model.config
    is_cut = cut.config.d_ff < model.config.d_ff
    return cut if same_data and same_shape and is_cut else None


def losses_of(model: GPT, passages: list[list[int]], rows: int) -> Tensor:
    """The loss of the model on each passage, (P,). rows: of the batch it makes."""
    losses = []
    for passage in passages:
        inputs = torch.tensor(passage[:-1]).view(rows, -1)
        targets = torch.tensor(passage[1:]).view(rows, -1)
        with torch.no_grad():
            losses.append(model(inputs, targets).item())
    return torch.tensor(losses)


def check_size(out_dir: Path) -> None:
    """Refuse a model that is too large for a browser, before it is loaded."""
    steps = [event for event in read_log(out_dir) if event["event"] == "step"]
    if not steps:
        raise UserError(f"{out_dir}: its log has no step yet; nothing to show")
    n_params = steps[-1]["params"]
    if n_params > LARGEST:
        limit = f"a browser is quick up to {LARGEST:,}"
        raise UserError(f"{out_dir}: {n_params:,} parameters; {limit}")


def find_passages(
    data: TokenDataset, words: list[bytes], n_tokens: int
) -> list[list[int]]:
    """Passages of n_tokens + 1 tokens: inputs and next tokens."""
    batches = data.in_order(1024, 2**20)
    tokens = torch.cat([inputs.flatten() for inputs, _ in batches]).tolist()
    words_in_order = [words[token] for token in tokens]
    passages = []
    for start in starts_of(words_in_order, n_tokens + 1):
        passages.append(tokens[start : start + n_tokens + 1])
    return passages


def encoded_weights(model: GPT) -> str:
    """All weights in float16, in base64. A tied matrix comes once."""
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    little_endian = weights.half().numpy().astype("<f2")
    return base64.b64encode(little_endian.tobytes()).decode()


def rounded(values: Tensor) -> list[float]:
    """Numbers in four digits."""
    return [float(f"{value:.4g}") for value in values.tolist()]


def net_of(out_dir: Path, other: Path | None = None) -> dict:
    """What the page holds. Raises UserError if it cannot show this run."""
    config, _ = load_config(str(out_dir))
    check_size(out_dir)
    trained = load_trained(out_dir)
    model = trained.model.cpu()
    shape = model.config
    train = TokenDataset(config.data_dir, "train", shape.context_length)
    val = TokenDataset(config.data_dir, "val", shape.context_length)
    words = all_tokens(trained.tokenizer)
    rows = max(1, PASSAGE_TOKENS // shape.context_length)
    n_tokens = rows * min(PASSAGE_TOKENS, shape.context_length)
    passages = find_passages(val, words, n_tokens)

    scores = scores_of(model, train, config.score_beta)
    models = [model, cut_in_half(model, scores)]
    cut = load_cut(other, config, model) if other else None
    if cut:
        models.append(cut)
    losses = [losses_of(each, passages, rows) for each in models]
    losses = torch.stack(losses, dim=1)  # (passages, models)
    if not passages or not losses.isfinite().all():
        problem = f"its text is shorter than {n_tokens} tokens, or it has diverged"
        raise UserError(f"{out_dir}: {problem}")
    # On a typical passage, each model has about its mean loss.
    distances = (losses - losses.mean(0)).abs().sum(1)
    typical = int(distances.argmin())

    steps = []
    if cut:
        steps.append([cut.config.d_ff, losses[typical, 2].item()])
    return {
        "config": asdict(shape),
        "was": config.d_ff,
        "eot": trained.tokenizer.eot_token,
        "rows": rows,
        "split": losses[:, 0].mean().item(),
        "passage": passages[typical],
        "shapes": {name: p.shape for name, p in model.named_parameters()},
        "weights": encoded_weights(model),
        "scores": [rounded(score) for score in scores.values()],
        "words": [word.decode("latin-1") for word in words],
        "steps": steps,
    }


def filled(net: dict) -> str:
    """The HTML of the page: the frame, with the data inside."""
    data = json.dumps(net, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # else a word could end the script
    return FRAME.read_text(encoding="utf-8").replace(MARK, data)


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=expanded, metavar="OUT_DIR")
    parser.add_argument("other", type=expanded, nargs="?", metavar="OTHER")
    parser.add_argument("--to", type=expanded, help="default: OUT_DIR/play.html")
    args = parser.parse_args(argv)
    html = filled(net_of(args.out_dir, args.other))
    to = args.to or args.out_dir / "play.html"
    write_whole(to, lambda file: file.write(html.encode()))
    print(to)


if __name__ == "__main__":
    raise SystemExit(main())
