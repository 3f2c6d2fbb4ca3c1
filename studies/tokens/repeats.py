"""Has a run learned to copy? Its loss where this token and the next stood together before.

python -m studies.tokens.repeats out/dictionary_142 out/dictionary_568 out/dictionary_1540

The folders are of runs of tools.compare; all must be done. Writes studies/tokens/repeats.csv.
"""

import sys
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

from data.loader import TokenDataset
from run.folder import read_log
from tools.load import load_trained
from tools.results import t_test

TOKENS = 100_000  # of the validation split


def repeated(tokens: Tensor, targets: Tensor) -> Tensor:
    """(B, T), boolean: whether token and target stand next to each other earlier in the sequence,
    so that a model which copies (an induction head, 2209.11895) could know the target."""
    same = (tokens[:, :, None] == tokens[:, None]) & (targets[:, :, None] == targets[:, None])
    return same.tril(-1).any(2)


@torch.no_grad()
def losses(folder: Path) -> tuple[float, float]:
    """Mean loss, in nats, over repeated pairs and over all others."""
    trained = load_trained(folder)
    model, c = trained.model.cpu(), trained.state["config"]
    data = TokenDataset(c["data_dir"], "val", c["context_length"])
    loss, where = [], []
    for x, y in data.in_order(64, TOKENS):
        loss.append(F.cross_entropy(model(x).transpose(1, 2), y, reduction="none").flatten())
        where.append(repeated(x, y).flatten())
    loss, where = torch.cat(loss), torch.cat(where)
    return loss[where].mean().item(), loss[~where].mean().item()


def main() -> None:
    lines = ["runs,arm,seed,val_loss,repeated,others"]
    for runs in map(Path, sys.argv[1:]):
        found = {}  # (arm, seed) -> losses
        for folder in sorted(runs.glob("*/*"), key=lambda p: (p.parent.name, int(p.name))):
            name = folder.parent.name, folder.name
            found[name] = read_log(folder)[-1]["val_loss"], *losses(folder)
            cells = [runs.name, *name, *(f"{x:.4f}" for x in found[name])]
            lines.append(",".join(cells))
        for i, what in enumerate(("val_loss", "repeated", "others")):
            ideas = {seed: of[i] for (arm, seed), of in found.items() if arm == "idea"}
            small = {seed: of[i] for (arm, seed), of in found.items() if arm == "scratch_flops"}
            pairs = [small[seed] - ideas[seed] for seed in small.keys() & ideas.keys()]
            print(
                f"{runs}, {what}: small model minus IDEA {mean(pairs):+.4f} ({t_test(pairs):.2g})"
            )
    Path(__file__).with_name("repeats.csv").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
