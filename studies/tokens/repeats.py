"""Has a run learned to copy? Its loss where this token and the next stood together before.

python -m studies.tokens.repeats out/dictionary_568 --to studies/tokens/dictionary_568
"""

import argparse
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

from data.loader import TokenDataset
from run.folder import read_log
from tools.compare import is_done
from tools.load import load_trained
from tools.results import arms_of, read_csv, t_test

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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, help="folder of the runs of a comparison")
    parser.add_argument("--to", type=Path, required=True, help="folder of repeats.csv")
    args = parser.parse_args()
    lines = ["arm,seed,val_loss,repeated,others"]
    for folder in sorted(args.runs.glob("*/*"), key=lambda p: (p.parent.name, int(p.name))):
        if is_done(log := read_log(folder)):
            cells = (log[-1]["val_loss"], *losses(folder))
            lines.append(",".join([folder.parent.name, folder.name, *(f"{x:.4f}" for x in cells)]))
    (args.to / "repeats.csv").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    arms = arms_of(read_csv(args.to / "repeats.csv"))
    small, idea = arms["scratch_flops"], arms["idea"]
    for key in ("val_loss", "repeated", "others"):
        pairs = [small[seed][key] - idea[seed][key] for seed in small if seed in idea]
        print(f"{key}: small model minus IDEA {mean(pairs):+.4f} (p = {t_test(pairs):.2g})")


if __name__ == "__main__":
    main()
