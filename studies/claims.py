"""The claims that were fixed before their runs: python -m studies.claims (needs SciPy)"""

from itertools import accumulate
from math import log2
from statistics import mean, stdev

from studies.results import ADAMW, effect, read
from tools.compare import paired

WINDOW = [("naive_50", "oneshot_50")]  # the first is said to end above the second
WINDOW += [(arm, "idea_50_75") for arm in ("oneshot_50", "scratch", "scratch_flops")]
WHEN = [("idea_50_75", "idea_10_35"), ("scratch", "idea_10_35")]  # the same, of window/when
PLACES = {"oneshot_25": 0.25, "oneshot_50": 0.5, "oneshot_625": 0.625, "oneshot_75": 0.75}
NO_CLAIM = [("scratch_flops_10_35", "idea_10_35"), ("oneshot_50", "idea_50_75")]
NO_CLAIM += [("scratch", "idea_50_75")]
SIZES = [f"size/dictionary_36{size}" for size in ("", "_250k", "_500k")]

Found = dict[str, tuple[float, float]]  # claim -> a mean, said to be above 0, and its p


def say(name: str, x: list[float]) -> tuple[float, float]:
    """Mean, its 95% interval, and p of a paired t-test. x: differences. Returns mean and p."""
    e = effect([x])
    print(f"{name}: {e.mean:+.4f} ({e.low:+.4f} to {e.high:+.4f}), p = {e.p:.2g};", end=" ")
    print(f"{e.pairs} above 0, sd {stdev(x):.4f}")
    return e.mean, e.p


def say_all(arms: dict, pairs: list[tuple[str, str]]) -> Found:
    """pairs: two arms each."""
    return {f"{a} minus {b}": say(f"{a} minus {b}", paired(arms[a], arms[b])) for a, b in pairs}


def judge(found: Found) -> None:
    """Print each claim's p by Holm, and its verdict."""
    ordered = sorted((p, name) for name, (_, p) in found.items())
    holm = accumulate((min(1, (len(found) - i) * p) for i, (p, _) in enumerate(ordered)), max)
    for p, (_, name) in zip(holm, ordered):
        verdict = "holds" if found[name][0] > 0 else "contradicted"
        print(f"CLAIM {name}: p by Holm {p:.2g}, {verdict if p < 0.05 else 'cannot tell'}")


def alike(name: str, x: list[float], bound: float) -> tuple[float, float]:
    """How far the mean is within -bound to bound, and p of two one-sided t-tests, the larger."""
    from scipy import stats

    p = max(
        stats.ttest_1samp(x, -bound, alternative="greater").pvalue,
        stats.ttest_1samp(x, bound, alternative="less").pvalue,
    )
    print(f"{name}: {mean(x):+.4f}, within {bound} of 0: p = {p:.2g}; sd {stdev(x):.4f}")
    return bound - abs(mean(x)), p


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
    judge(say_all(arms, start))
    no_claim = [(f"{a}_usual", f"{a}_width") for a in ("idea", "scratch")]
    no_claim += [
        (f"{a}_{s}", f"idea_{s}") for s in ("usual", "width") for a in ("scratch", "scratch_flops")
    ]
    say_all(arms, no_claim)
    sizes = [read(name) for name in SIZES]
    leads = [paired(arms["scratch"], arms["idea"]) for arms in sizes]
    doublings = [log2(arms["idea"][51]["params"]) for arms in sizes]
    fall = [-x for x in slopes(doublings, leads)]
    names = "467k, scratch minus idea", "fall of that lead for a doubling of the size"
    judge({name: say(name, x) for name, x in zip(names, (leads[-1], fall))})
    for name, arms in zip([*SIZES, ADAMW], [*sizes, read(ADAMW)]):
        print(f"{name}:")
        say_all(arms, [(a, b) for b in arms if "idea" in b for a in arms if "idea" not in a])
    arms, found = read("optimizer"), {}
    for small in ("scratch", "scratch_flops"):
        leads = {o: paired(arms[f"{small}_{o}"], arms[f"idea_{o}"]) for o in ("adamw", "muon")}
        more = [m - a for a, m in zip(*leads.values(), strict=True)]
        for name, x in (leads | {"muon's lead minus adamw's": more}).items():
            found[f"{small}, {name}"] = say(f"{small} minus idea, {name}", x)
    claims = "scratch, adamw", "scratch, muon's lead minus adamw's"
    judge({name: found[name] for name in claims})
    lengths = {f"dictionary_{n}": read(f"tokens/dictionary_{n}") for n in (142, 568, 1540)}
    leads = {n: paired(arms["scratch_flops"], arms["idea"]) for n, arms in lengths.items()}
    judge({name: say(f"{name}, scratch_flops minus idea", x) for name, x in leads.items()})
    judge(say_all(read("window/late"), WINDOW))
    arms = read("window/when")
    found, two = say_all(arms, WHEN), ("idea_50_75", "oneshot_625")
    found[" minus ".join(two)] = alike(" minus ".join(two), paired(*(arms[a] for a in two)), 0.004)
    once = [[arms[a][seed]["val_loss"] for seed in arms["oneshot_25"]] for a in PLACES]
    rise = slopes([*PLACES.values()], once)
    found["slope"] = say("slope of one shot's loss over its place", rise)
    print("means by place:", *(f"{mean(x):.4f}" for x in once))
    judge(found)
    say_all(arms, NO_CLAIM)
    muon = {a: {s: row for s, row in x.items() if s > 33} for a, x in read("window/muon").items()}
    judge(say_all(muon, [("scratch", "idea_10_35")]))


if __name__ == "__main__":
    main()
