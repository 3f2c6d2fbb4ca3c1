"""The lowest loss of each arm by the number of epochs, over the rates and weight decays that were
tried: not as many for each arm and number of epochs (sweep.csv). Dashed: arms with a single run at
each number of epochs.

python -m studies.limited.figure studies/limited
"""

import argparse
import csv
from pathlib import Path

from tools.figures import open_figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="has sweep.csv, and gets epochs.png")
    args = parser.parse_args()
    losses: dict[str, dict[int, list[float]]] = {}  # arm -> epochs -> of all rates and decays
    with open(args.folder / "sweep.csv", newline="") as file:
        for row in csv.DictReader(file):
            of_arm = losses.setdefault(row["arm"], {})
            of_arm.setdefault(int(row["epochs"]), []).append(float(row["val_loss"]))
    figure, axes = open_figure(1, 1, figsize=(6, 4))
    panel = axes[0, 0]
    for arm, by_epochs in losses.items():
        lowest = sorted((epochs, min(values)) for epochs, values in by_epochs.items())
        tuned = max(map(len, by_epochs.values())) > 1
        style, label = ("o-", arm) if tuned else ("o--", f"{arm} (not tuned)")
        panel.plot(*zip(*lowest), style, ms=4, label=label)
    panel.set_xscale("log")
    ticks = sorted({epochs for by_epochs in losses.values() for epochs in by_epochs})
    panel.set_xticks(ticks, ticks)
    panel.minorticks_off()
    panel.set_xlabel("epochs")
    panel.set_ylabel("loss at the end, nats per token")
    panel.legend(frameon=False)
    figure.savefig(args.folder / "epochs.png", dpi=130)


if __name__ == "__main__":
    main()
