"""The lowest loss of each arm by the number of epochs, over the rates and weight decays that were
tried: not as many for each arm and number of epochs (sweep.csv).

python -m experiments.limited.figure results/limited
"""

import argparse
import csv
import math
from pathlib import Path

from tools.plot import open_figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="has sweep.csv, and gets epochs.png")
    args = parser.parse_args()
    lowest: dict[str, dict[int, float]] = {}  # arm -> epochs -> loss
    with open(args.folder / "sweep.csv", newline="") as file:
        for row in csv.DictReader(file):
            losses, epochs = lowest.setdefault(row["arm"], {}), int(row["epochs"])
            losses[epochs] = min(losses.get(epochs, math.inf), float(row["val_loss"]))
    figure, axes = open_figure(1, 1, figsize=(6, 4))
    panel = axes[0, 0]
    for arm, losses in lowest.items():
        panel.plot(*zip(*sorted(losses.items())), "o-", ms=4, label=arm)
    panel.set_xscale("log")
    ticks = sorted({epochs for losses in lowest.values() for epochs in losses})
    panel.set_xticks(ticks, ticks)
    panel.minorticks_off()
    panel.set_xlabel("epochs")
    panel.set_ylabel("loss at the end, nats per token")
    panel.legend(frameon=False)
    figure.savefig(args.folder / "epochs.png", dpi=130)


if __name__ == "__main__":
    main()
