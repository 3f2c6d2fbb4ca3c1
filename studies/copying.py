"""Has a run learned to copy? python -m studies.copying out/a out/b ...

Where this token and the next stood next to each other earlier in the sequence, an induction head
(arXiv 2209.11895) knows the next one. A run that has none pays as much there as a run that copies
pays for what is new. Losses are over 100,000 tokens of the validation split.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.command import command
from data.loader import TokenDataset
from run.config import load_config
from tools import load_trained


def repeated(tokens: Tensor, targets: Tensor) -> Tensor:
    """(B, T), boolean: whether token and target stand next to each other earlier, too."""
    same = (tokens[:, :, None] == tokens[:, None]) & (targets[:, :, None] == targets[:, None])
    return same.tril(-1).any(2)


@torch.no_grad()
def losses(folder: Path) -> tuple[float, float, float]:
    """In nats per token: where a copy would do, elsewhere; and the share of the first."""
    model, c = load_trained(folder).model.cpu().float(), load_config(str(folder))
    loss, where = [], []
    for x, y in TokenDataset(c.data_dir, "val", c.context_length).in_order(64, 100_000):
        loss.append(F.cross_entropy(model(x).transpose(1, 2), y, reduction="none").flatten())
        where.append(repeated(x, y).flatten())
    loss, where = torch.cat(loss), torch.cat(where)
    return loss[where].mean().item(), loss[~where].mean().item(), where.float().mean().item()


@command
def main(argv: list[str]) -> None:
    print("repeated,others,share of repeated,run")
    for folder in argv:
        print(",".join(f"{x:.3f}" for x in losses(Path(folder))) + f",{folder}")


if __name__ == "__main__":
    sys.exit(main())
