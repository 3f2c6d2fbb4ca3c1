"""The claims of start/, size/, optimizer/ and window/: python -m studies.claims (needs SciPy)"""

from itertools import accumulate
from math import log2
from statistics import mean, stdev

from studies.results import effect, read
from tools.compare import paired

WINDOW = [("naive_50", "oneshot_50")]  # the first is said to end above the second
WINDOW += [(arm, "idea_50_75") for arm in ("oneshot_50", "scratch", "scratch_flops")]
WHEN = [("idea_50_75", "idea_10_35"), ("scratch", "idea_10_35")]  # the same, of window/when
PLACES = {"oneshot_25": 0.25, "oneshot_50": 0.5, "oneshot_625": 0.625, "oneshot_75": 0.75}
NO_CLAIM = [("scratch_flops_10_35", "idea_10_35"), ("oneshot_50", "idea_50_75")]
NO_CLAIM += [("scratch", "idea_50_75")]
SIZES = [f"size/dictionary_36{size}" for size in ("", "_250k", "_500k")]


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


def slopes(x: list[float], y: list[list[float]]) -> list[float]:
    """By seed, the least-squares slope over x. y: for each x, a number of each seed."""
    from scipy import stats

    return [stats.linregress(x, of_seed).slope for of_seed in zip(*y, strict=True)]


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
    sizes = [read(name) for name in SIZES]
    leads = [paired(arms["scratch"], arms["idea"]) for arms in sizes]
    doublings = [log2(arms["idea"][51]["params"]) for arms in sizes]
    p = {"500k": say("scratch minus idea, 500k, same tokens", leads[-1])}
    p["slope"] = say("slope of that lead, a doubling of the size", slopes(doublings, leads))
    holm(p)
    for name, arms in zip(SIZES, sizes):
        print(f"{name}:")
        say_all(arms, [(small, "idea") for small in arms if small != "idea"])
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
    once = [[arms[a][seed]["val_loss"] for seed in arms["oneshot_25"]] for a in PLACES]
    p["slope"] = say("slope of one shot's loss over its place", slopes([*PLACES.values()], once))
    print("means by place:", *(f"{mean(x):.4f}" for x in once))
    holm(p)
    say_all(arms, NO_CLAIM)


if __name__ == "__main__":
    main()
