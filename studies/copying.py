"""Has a run learned to copy? python -m studies.copying out/a out/b ...

An induction head (arXiv 2209.11895) finds where the current token stood before in the
sequence, and predicts the token that followed it there. This prints a run's loss on the
tokens that such a copy gets right, and its loss on all others. A run that cannot copy
pays as much on the first as a run that can copy pays on the second. Losses are over
100,000 tokens of the validation split.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import load_config
from data.command import command
from data.loader import TokenDataset
from tools import load_trained


def is_repeated(tokens: Tensor, targets: Tensor) -> Tensor:
    """(B, T), boolean: whether this token and target also stood together earlier."""
    same_token = tokens[:, :, None] == tokens[:, None]  # (B, T, T)
    same_target = targets[:, :, None] == targets[:, None]
    same = same_token & same_target
    return same.tril(-1).any(2)


@torch.no_grad()
def copy_losses(folder: Path) -> tuple[float, float, float]:
    """Nats per token where a copy is right, and elsewhere; the share of the first."""
    config, _ = load_config(str(folder))
    model = load_trained(folder).model.cpu().float()
    dataset = TokenDataset(config.data_dir, "val", config.context_length)
    losses = []
    repeated = []
    for tokens, targets in dataset.in_order(64, 100_000):
        logits = model(tokens).transpose(1, 2)  # (B, vocab_size, T)
        loss = F.cross_entropy(logits, targets, reduction="none")
        losses.append(loss.flatten())
        repeated.append(is_repeated(tokens, targets).flatten())
    loss = torch.cat(losses)
    where = torch.cat(repeated)
    on_repeated = loss[where].mean()
    on_others = loss[~where].mean()
    return on_repeated.item(), on_others.item(), where.float().mean().item()


@command
def main(argv: list[str]) -> None:
    print("repeated,others,share of repeated,run")
    for folder in argv:
        numbers = [f"{x:.3f}" for x in copy_losses(Path(folder))]
        print(",".join([*numbers, folder]))


if __name__ == "__main__":
    sys.exit(main())
