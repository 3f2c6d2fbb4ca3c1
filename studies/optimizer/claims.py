"""The claims of this study, from its runs.csv: python -m studies.optimizer.claims"""

from pathlib import Path
from statistics import mean, stdev

from scipy import stats

from tools.results import read_csv


def main() -> None:
    arms = read_csv(Path(__file__).with_name("runs.csv"))
    loss = {
        arm: {seed: row["val_loss"] for seed, row in runs.items()} for arm, runs in arms.items()
    }
    for small in ("scratch", "scratch_flops"):
        leads = {}  # of IDEA, by seed
        for optimizer in ("adamw", "muon"):
            theirs, ours = (loss.get(f"{arm}_{optimizer}", {}) for arm in (small, "idea"))
            name = f"{small} minus idea, {optimizer}"
            leads[name] = {seed: theirs[seed] - ours[seed] for seed in theirs if seed in ours}
        adamw, muon = leads.values()
        larger = {seed: muon[seed] - adamw[seed] for seed in muon if seed in adamw}
        leads["the lead with muon minus that with adamw"] = larger
        for name, lead in leads.items():
            if len(x := list(lead.values())) > 1:
                test = stats.ttest_1samp(x, 0)
                low, high = test.confidence_interval()
                above = f"{sum(d > 0 for d in x)} of {len(x)} above 0, sd {stdev(x):.4f}"
                print(
                    f"{name}: {mean(x):+.4f} ({low:+.4f} to {high:+.4f}), p = {test.pvalue:.2g}; {above}"
                )


if __name__ == "__main__":
    main()
