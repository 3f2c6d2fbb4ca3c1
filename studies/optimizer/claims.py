"""The claims of this study, from its runs.csv: python -m studies.optimizer.claims (needs SciPy)"""

from pathlib import Path
from statistics import mean, stdev

from tools.results import read_csv


def say(name: str, differences: dict[int, float]) -> None:
    """Mean, its 95% interval, and p of a paired t-test. differences: by seed."""
    from scipy import stats

    x = list(differences.values())
    if len(x) > 1:
        test = stats.ttest_1samp(x, 0)
        low, high = test.confidence_interval()
        print(
            f"{name}: {mean(x):+.4f} ({low:+.4f} to {high:+.4f}), p = {test.pvalue:.2g};", end=" "
        )
        print(f"{sum(d > 0 for d in x)} of {len(x)} above 0, sd {stdev(x):.4f}")


def main() -> None:
    loss = {}
    for arm, runs in read_csv(Path(__file__).with_name("runs.csv")).items():
        loss[arm] = {seed: row["val_loss"] for seed, row in runs.items()}
    for small in ("scratch", "scratch_flops"):
        leads = []  # of IDEA, by seed
        for optimizer in ("adamw", "muon"):
            theirs, ours = (loss.get(f"{arm}_{optimizer}", {}) for arm in (small, "idea"))
            leads.append({seed: theirs[seed] - ours[seed] for seed in theirs if seed in ours})
            say(f"{small} minus idea, {optimizer}", leads[-1])
        adamw, muon = leads
        larger = {seed: muon[seed] - adamw[seed] for seed in muon if seed in adamw}
        say(f"{small}: the lead with muon minus that with adamw", larger)


if __name__ == "__main__":
    main()
