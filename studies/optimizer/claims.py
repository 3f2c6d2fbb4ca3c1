"""The claims of this study, from its runs.csv: python -m studies.optimizer.claims (needs SciPy)"""

from pathlib import Path
from statistics import mean, stdev

from tools.results import paired, read_csv


def say(name: str, x: list[float]) -> None:
    """Mean, its 95% interval, and p of a paired t-test. x: differences."""
    from scipy import stats

    test = stats.ttest_1samp(x, 0)
    low, high = test.confidence_interval()
    print(f"{name}: {mean(x):+.4f} ({low:+.4f} to {high:+.4f}), p = {test.pvalue:.2g};", end=" ")
    print(f"{sum(d > 0 for d in x)} of {len(x)} above 0, sd {stdev(x):.4f}")


def main() -> None:
    arms = read_csv(Path(__file__).with_name("runs.csv"))  # all have the same seeds
    for small in ("scratch", "scratch_flops"):
        leads = {o: paired(arms[f"{small}_{o}"], arms[f"idea_{o}"]) for o in ("adamw", "muon")}
        for optimizer, lead in leads.items():
            say(f"{small} minus idea, {optimizer}", lead)
        larger = [m - a for a, m in zip(*leads.values(), strict=True)]
        say(f"{small}: the lead with muon minus that with adamw", larger)


if __name__ == "__main__":
    main()
