"""The claims of start/, optimizer/ and window/: python -m studies.claims (needs SciPy)"""

from itertools import accumulate
from statistics import mean, stdev

from studies.results import effect, read
from tools.compare import paired

WINDOW = [("naive_50", "oneshot_50")]  # the first is said to end above the second
WINDOW += [(arm, "idea_50_75") for arm in ("oneshot_50", "scratch", "scratch_flops")]
WHEN = [("idea_50_75", "idea_10_35"), ("scratch", "idea_10_35")]  # the same, of window/when
PLACES = {"oneshot_25": 0.25, "oneshot_50": 0.5, "oneshot_625": 0.625, "oneshot_75": 0.75}
NO_CLAIM = [("scratch_flops_10_35", "idea_10_35"), ("oneshot_50", "idea_50_75")]
NO_CLAIM += [("scratch", "idea_50_75")]


def say(name: str, x: list[float]) -> float:
    """Mean, its 95% interval, and p of a paired t-test, which is returned. x: differences."""
    e = effect([x])
    print(f"{name}: {e.mean:+.4f} ({e.low:+.4f} to {e.high:+.4f}), p = {e.p:.2g};", end=" ")
    print(f"{e.pairs} above 0, sd {stdev(x):.4f}")
    return e.p


def say_all(arms: dict, pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Contrast -> p. pairs: two arms each."""
    return {f"{a} minus {b}": say(f"{a} minus {b}", paired(arms[a], arms[b])) for a, b in pairs}


def holm(p: dict[str, float]) -> None:
    """Print each p, corrected for their number."""
    ordered = sorted((x, name) for name, x in p.items())
    corrected = accumulate((min(1, (len(p) - i) * x) for i, (x, _) in enumerate(ordered)), max)
    print("p by Holm:", *(f"{name}: {x:.2g};" for x, (_, name) in zip(corrected, ordered)))


def alike(name: str, x: list[float], bound: float) -> float:
    """p of two one-sided t-tests, the larger one: is the mean within -bound to bound?"""
    from scipy import stats

    p = max(
        stats.ttest_1samp(x, -bound, alternative="greater").pvalue,
        stats.ttest_1samp(x, bound, alternative="less").pvalue,
    )
    print(f"{name}: {mean(x):+.4f}, within {bound} of 0: p = {p:.2g}; sd {stdev(x):.4f}")
    return p


def slopes(arms: dict) -> list[float]:
    """By seed, the least-squares slope of one shot's loss over its place, nats per whole run."""
    from scipy import stats

    seeds = sorted(set.intersection(*(set(arms[a]) for a in PLACES)))
    losses = ([arms[a][seed]["val_loss"] for a in PLACES] for seed in seeds)
    return [stats.linregress([*PLACES.values()], y).slope for y in losses]


def better_start(arms: dict, arm: str) -> str:
    """The one of its two starts with the lower mean."""
    starts = [f"{arm}_usual", f"{arm}_width"]
    return min(starts, key=lambda name: mean(row["val_loss"] for row in arms[name].values()))


def main() -> None:
    arms = read("start/start")
    idea, small, longer = (better_start(arms, a) for a in ("idea", "scratch", "scratch_flops"))
    start = [("scratch_flops_usual", "scratch_flops_width"), (longer, idea), (small, idea)]
    holm(say_all(arms, start))
    no_claim = [(f"{a}_usual", f"{a}_width") for a in ("idea", "scratch")]
    no_claim += [
        (f"{a}_{s}", f"idea_{s}") for s in ("usual", "width") for a in ("scratch", "scratch_flops")
    ]
    say_all(arms, no_claim)
    arms = read("optimizer")
    for small in ("scratch", "scratch_flops"):
        leads = {o: paired(arms[f"{small}_{o}"], arms[f"idea_{o}"]) for o in ("adamw", "muon")}
        for optimizer, lead in leads.items():
            say(f"{small} minus idea, {optimizer}", lead)
        larger = [m - a for a, m in zip(*leads.values(), strict=True)]
        say(f"{small}: the lead with muon minus that with adamw", larger)
    holm(say_all(read("window/late"), WINDOW))
    arms = read("window/when")
    p, two = say_all(arms, WHEN), ("idea_50_75", "oneshot_625")
    p[" minus ".join(two)] = alike(" minus ".join(two), paired(*(arms[a] for a in two)), 0.004)
    p["slope"] = say("slope of one shot's loss over its place", slopes(arms))
    by_place = [mean(r["val_loss"] for r in arms[a].values()) for a in PLACES]
    print("means by place:", *(f"{x:.4f}" for x in by_place))
    holm(p)
    say_all(arms, NO_CLAIM)


if __name__ == "__main__":
    main()
