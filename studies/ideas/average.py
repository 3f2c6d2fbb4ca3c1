"""Loss and average size of all tables that have the small model on the same tokens.

python -m studies.ideas.average studies/*/ studies/*/*/ --to studies/ideas/average.png
"""

import argparse
import math
from pathlib import Path
from statistics import mean

from tools.figures import open_figure
from tools.results import arms_of, paired, read_csv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="results of tools.compare")
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    figure, axes = open_figure(1, 1, figsize=(8, 4.5))
    panel = axes[0, 0]
    for i, folder in enumerate(f for f in args.folders if (f / "runs.csv").exists()):
        arms = arms_of(read_csv(folder / "runs.csv"))
        small = arms.pop("scratch", None)
        if not small:
            continue
        tokens, flops = ({run[key] for run in small.values()} for key in ("tokens", "flops"))
        points = {}  # arm -> average FLOPs of a token, small model = 1; loss minus its loss
        for name, runs in arms.items():
            if "taught" in name:  # its FLOPs hold the teacher's
                continue
            one = next(iter(runs.values()))
            if one["tokens"] in tokens and len(runs) > 1 and runs.keys() & small.keys():
                points[name] = one["flops"] / max(flops), mean(paired(runs, small))
        style = {"color": f"C{i % 10}", "marker": "os^Dv"[i // 10 % 5], "ls": "", "ms": 5}
        panel.plot(*zip(*points.values()), **style, alpha=0.7, label=str(folder).partition("/")[2])
        if "enlarged" in points:  # what the average size predicts, between two models never pruned
            size, gain = points["enlarged"]
            x = [1 + (size - 1) * t / 50 for t in range(51)]
            panel.plot(x, [gain * math.log(a) / math.log(size) for a in x], "-", color=f"C{i % 10}")
            for name, (a, d) in sorted(points.items()):
                share = d / (gain * math.log(a) / math.log(size))
                print(f"{folder}: {name}: {a:.2f} times the FLOPs a token, {share:.0%} of the gain")
    panel.axhline(0, color="black", lw=0.8)
    panel.xaxis.set_major_formatter("{x:.1f}")
    panel.set_xlabel("average size over the run (FLOPs of a token, small model = 1)")
    panel.set_ylabel("loss minus the small model's, nats per token")
    panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(args.to, dpi=110)


if __name__ == "__main__":
    main()
