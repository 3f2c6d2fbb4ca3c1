"""A trained GPT to prune by hand in a browser, as one file: tools.page writes it beside its page.

Weights, scores, words and a held-out passage are inside it; tools/play.html is the frame."""

import base64
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import torch

from data.command import UserError
from data.loader import TokenDataset
from data.tokenizer import all_tokens
from model import GPT
from prune import Pruner, choose, slice_group
from run.config import load_config
from run.log import read_log
from tools import filled, load_trained

TOKENS = 512  # of the passage: a browser takes 50 ms for their loss
LARGEST = 2**20  # parameters that do so in a second, and in a file of 3 MB


def starts_of(text: list[bytes], n: int) -> list[int]:
    """Where a passage of n tokens may begin: with a sentence, and if it can be inside one text."""
    every = range(1, len(text) - n + 1)
    sentences = [i for i in every if text[i - 1] in (b".", b"") and text[i][1:2].isupper()]
    inside = [i for i in sentences if all(w and w.isascii() for w in text[i : i + n])]
    found = inside or sentences or every
    return list(found[:: -(-len(found) // 100) or 1])  # at most 100 of them


def scores_of(model: GPT, data: TokenDataset, beta: float) -> dict[str, torch.Tensor]:
    """From 40 batches of training text, as a run makes them."""
    pruner = Pruner("sensitivity", beta, {"d_ff"}, seed=1)
    for step in range(1, 41):
        model.zero_grad()
        model(*data.batch(step, 16, seed=1)).backward()
        pruner.score(model)
    return pruner.scores


def page_of(out_dir: Path, other: Path | None = None) -> str:
    """The HTML. other: the same model, cut in steps while it trained, is a mark. Raises UserError,
    also where a browser would be too slow, or the text is too short."""
    c, steps = load_config(str(out_dir)), [e for e in read_log(out_dir) if e["event"] == "step"]
    if (size := steps[-1]["params"]) > LARGEST:  # asked before a large one is loaded
        raise UserError(f"{out_dir}: {size:,} parameters; a browser is quick up to {LARGEST:,}")
    trained = load_trained(out_dir)
    model, config = trained.model.cpu(), trained.model.config
    val, train = (TokenDataset(c.data_dir, s, config.context_length) for s in ("val", "train"))
    tokens = torch.cat([x.flatten() for x, _ in val.in_order(1024, 2**20)]).tolist()
    words, rows = all_tokens(trained.tokenizer), max(1, TOKENS // config.context_length)
    n = rows * min(TOKENS, config.context_length)  # TOKENS in whole rows
    scores, models = scores_of(model, train, c.score_beta), [model, deepcopy(model)]
    for group in [group for group in model.groups() if group.kind == "d_ff"]:  # half by score
        slice_group(models[1], [], group, choose(scores[group.name], -(-group.width // 2)))
    if other and (theirs := load_config(str(other))).prune_schedule == "cubic":
        cut = load_trained(other).model.cpu()
        same = replace(cut.config, d_ff=config.d_ff) == config and theirs.data_dir == c.data_dir
        models += [cut] if same and cut.config.d_ff < config.d_ff else []
    passages = [tokens[i : i + n + 1] for i in starts_of([words[t] for t in tokens], n + 1)]
    with torch.no_grad():
        batches = [torch.tensor([p[:-1], p[1:]]).view(2, rows, -1) for p in passages]
        losses = torch.tensor([[m(x, y).item() for m in models] for x, y in batches])  # (P, models)
    if not len(losses) or not losses.isfinite().all():
        raise UserError(f"{out_dir}: its text is shorter than {n} tokens, or it has diverged")
    typical = (losses - losses.mean(0)).abs().sum(1).argmin()  # near the mean of all, for each
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).half()  # tied: once
    net = {"config": asdict(config), "was": c.d_ff, "eot": trained.tokenizer.eot_token}
    net |= {"rows": rows, "split": losses[:, 0].mean().item(), "passage": passages[typical]}
    net["shapes"] = {name: p.shape for name, p in model.named_parameters()}
    net["weights"] = base64.b64encode(weights.numpy().astype("<f2").tobytes()).decode()
    net["scores"] = [[float(f"{s:.4g}") for s in x.tolist()] for x in scores.values()]
    net["words"] = [word.decode("latin-1") for word in words]
    net["steps"] = [[m.config.d_ff, losses[typical, 2].item()] for m in models[2:]]
    return filled("play.html", "/*NET*/", net)
