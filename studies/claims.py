"""The claims of optimizer/ and window/: python -m studies.claims (needs SciPy)"""

from itertools import accumulate
from statistics import mean, stdev

from studies.tokens.figure import STUDIES
from tools.results import paired, read_csv

WINDOW = [("naive_50", "oneshot_50")]  # the first is said to end above the second
WINDOW += [(arm, "idea_50_75") for arm in ("oneshot_50", "scratch", "scratch_flops")]


def say(name: str, x: list[float]) -> float:
    """Mean, its 95% interval, and p of a paired t-test, which is returned. x: differences."""
    from scipy import stats

    test = stats.ttest_1samp(x, 0)
    low, high = test.confidence_interval()
    print(f"{name}: {mean(x):+.4f} ({low:+.4f} to {high:+.4f}), p = {test.pvalue:.2g};", end=" ")
    print(f"{sum(d > 0 for d in x)} of {len(x)} above 0, sd {stdev(x):.4f}")
    return test.pvalue


def main() -> None:
    arms = read_csv(STUDIES / "optimizer/runs.csv")
    for small in ("scratch", "scratch_flops"):
        leads = {o: paired(arms[f"{small}_{o}"], arms[f"idea_{o}"]) for o in ("adamw", "muon")}
        for optimizer, lead in leads.items():
            say(f"{small} minus idea, {optimizer}", lead)
        larger = [m - a for a, m in zip(*leads.values(), strict=True)]
        say(f"{small}: the lead with muon minus that with adamw", larger)
    arms = read_csv(STUDIES / "window/runs.csv")
    p = sorted((say(f"{a} minus {b}", paired(arms[a], arms[b])), a, b) for a, b in WINDOW)
    holm = accumulate((min(1, n * x) for n, (x, *_) in zip((4, 3, 2, 1), p)), max)
    print("p by Holm:", *(f"{a} minus {b}: {x:.2g};" for x, (_, a, b) in zip(holm, p)))


if __name__ == "__main__":
    main()
