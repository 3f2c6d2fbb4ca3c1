"""The evidence: python -m studies.results (needs requirements-extra.txt)

It prints the tables of README.md, all from runs.csv, and draws docs/results.png. A comparison is
what a study has of a text, a shape, a number of tokens, an optimizer and a window. In a mean over
several, all weigh the same. Its 95% interval comes from how seeds spread within comparisons
(Satterthwaite's degrees of freedom), or of three or more, from Student's t over their means, if
that is wider. To add runs of tools.compare, put study, setting, text, optimizer and window before
each line of its runs.csv.
"""

import csv
import math
import sys
from collections.abc import Iterator
from itertools import accumulate, product
from pathlib import Path
from statistics import linear_regression, mean, variance
from typing import NamedTuple

from data.command import command
from docs.pictures import law, save
from tools.compare import COLUMNS, Arms, paired, t_test

# In no mean: the same seeds again, another method or width, a weak base
OTHERS = "challenge course first_edition ideas teacher units/axes larger/share_25 larger/share_75"
OTHERS += " rising/rising_18_adamw rising/rising_36_adamw warm-up"
# Final parameters, tokens for each, optimizer, where they prune
ROWS = [
    ("58k, 250k", range(16, 19), "Muon", "10-35"),
    ("58k", range(30, 50), "Muon", "10-35"),
    ("263k, 467k", range(30, 50), "Muon", "10-35"),
    ("70k, another shape", range(50, 60), "Muon", "10-35"),
    ("250k", range(60, 150), "Muon", "10-35"),
    ("58k", range(60, 80), "Muon", "10-35"),
    ("58k", range(100, 300), "Muon", "10-35"),
    ("58k", range(500, 600), "Muon", "10-35"),
    ("58k, 250k", range(500, 2000), "Muon", "25-50"),
    ("58k", range(60, 80), "AdamW", "10-35"),
    ("58k", range(100, 300), "AdamW", "10-35"),
    ("263k", range(30, 50), "AdamW", "10-35"),
    ("58k", range(500, 600), "AdamW", "10-35"),
    ("58k", range(500, 600), "AdamW", "50-75"),
]
SMALL, EQUAL = "small model above", "differ by less than 0.004"  # a claim by two one-sided tests


class Effect(NamedTuple):
    """Of two things compared, the second's loss minus the first's, in nats per token."""

    tests: tuple[list[float], ...]  # by seed
    pairs: str  # above 0
    mean: float
    low: float  # of the 95% interval
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f}), {self.pairs}"


class Lead(NamedTuple):
    """How far IDEA ends below the small model."""

    tokens: int  # for each final parameter
    size: str
    optimizer: str
    window: str
    low: bool  # at another, lower learning rate
    part: str  # on the same tokens, or FLOPs
    differences: list[float]  # by seed


def effect(*tests: list[float]) -> Effect:
    from scipy.stats import t

    means, k = [mean(d) for d in tests], len(tests)
    v = [variance(d) / len(d) for d in tests]
    freedom = sum(v) ** 2 / sum(x**2 / (len(d) - 1) for x, d in zip(v, tests))
    ways = [(math.sqrt(sum(v)) / k, freedom)]  # a standard error, its degrees of freedom
    if k > 2:
        ways.append((math.sqrt(variance(means) / k), k - 1))
    half = max(error * t.ppf(0.975, df) for error, df in ways)
    pairs = f"{sum(x > 0 for d in tests for x in d)} of {sum(map(len, tests))}"
    return Effect(tests, pairs, mean(means), mean(means) - half, mean(means) + half)


def read() -> dict[str, Arms]:
    """STUDY/SETTING -> its arms."""
    settings: dict[str, Arms] = {}
    with open(Path(__file__).parent / "runs.csv", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            arms = settings.setdefault(f"{line['study']}/{line['setting']}", {})
            row = line | {key: kind(line[key] or 0) for key, kind in COLUMNS.items()}
            arms.setdefault(row["arm"], {})[row["seed"]] = row
    return settings


def leads(settings: dict[str, Arms]) -> Iterator[Lead]:
    """All comparisons of IDEA with a small model on its tokens, or its FLOPs."""
    for name, arms in settings.items():
        if {name, name.partition("/")[0]} & {*OTHERS.split()}:
            continue
        for (idea, runs), (small, others) in product(arms.items(), arms.items()):
            one, other = (next(iter(x.values())) for x in (runs, others))
            part = "same tokens" if one["tokens"] == other["tokens"] else "same FLOPs"
            even = part == "same tokens" or math.isclose(one["flops"], other["flops"], rel_tol=2e-3)
            if idea.startswith("idea") and small.startswith("scratch") and even:
                each, size = round(one["tokens"] / one["params"]), f"{one['params'] / 1000:.0f}k"
                where = each, size, one["optimizer"], one["window"], idea == "idea_low", part
                yield Lead(*where, paired(others, runs))


def points(found: list[Lead]) -> dict[Lead, Effect]:
    """The comparisons of one size, number of tokens, optimizer and window together."""
    together: dict[Lead, list] = {}
    for lead in found:
        together.setdefault(lead._replace(differences=None), []).append(lead.differences)
    return {key: effect(*tests) for key, tests in sorted(together.items())}


def main_table(found: list[Lead]) -> str:
    heads = "final parameters|tokens for each|optimizer|pruned at|on the same tokens|same FLOPs"
    text = f"|{heads}|\n{'|---' * 6}|\n"
    for sizes, tokens, optimizer, window in ROWS:
        row = [x for x in found if x[2:5] == (optimizer, window, False) and x.tokens in tokens]
        row = [lead for lead in row if lead.size in sizes.replace(",", "").split()]
        each = sorted({f"{lead.tokens:,}": lead.tokens for lead in row}.items(), key=lambda x: x[1])
        text += f"|{sizes}|{' to '.join(dict.fromkeys((each[0][0], each[-1][0])))}|{optimizer}"
        text += f"|{window.replace('-', ' to ')}%"
        for part in ("same tokens", "same FLOPs"):
            tests = [lead.differences for lead in row if lead.part == part]
            text += f"|{effect(*tests) if tests else ''}"
        text += "|\n"
    return text


def minus(arms: Arms, small: str = "scratch", idea: str = "idea") -> list[float]:
    return paired(arms[small], arms[idea])


def restarts(arms: Arms) -> list[float]:
    """naive minus one shot by seed, the mean of all places where both prune (their FLOPs tell)."""
    flops = {name: next(iter(runs.values()))["flops"] for name, runs in arms.items()}
    naive, once = ([a for a in arms if a.startswith(start)] for start in ("naive", "oneshot"))
    places = [minus(arms, a, b) for a in naive for b in once if flops[a] == flops[b]]
    return [mean(of_seed) for of_seed in zip(*places, strict=True)]


def slopes(x: list[float], y: list[list[float]]) -> list[float]:
    """By seed, the least-squares slope over x. y: for each x, a number of each seed."""
    return [linear_regression(x, of_seed).slope for of_seed in zip(*y, strict=True)]


def comparisons(s: dict[str, Arms]) -> Iterator[tuple[str, ...]]:
    """Study, claim, and by seed what it says is above 0, of claims fixed before their runs; "",
    and what else the page quotes."""
    late, when, muon = (s[f"window/{name}"] for name in ("late", "when", "muon"))
    yield "late window", "a restart after one prune costs", minus(late, "naive_50", "oneshot_50")
    yield "late window", "one prune ends above IDEA", minus(late, "oneshot_50", "idea_50_75")
    yield "late window", f"{SMALL} IDEA, same tokens", minus(late, "scratch", "idea_50_75")
    yield "late window", f"{SMALL} IDEA, same FLOPs", minus(late, "scratch_flops", "idea_50_75")
    places = {"oneshot_25": 0.25, "oneshot_50": 0.5, "oneshot_625": 0.625, "oneshot_75": 0.75}
    once = [[row["val_loss"] for row in when[arm].values()] for arm in places]
    yield "window", "late IDEA ends above early IDEA", minus(when, "idea_50_75", "idea_10_35")
    yield "window", f"{SMALL} early IDEA, same tokens", minus(when, "scratch", "idea_10_35")
    yield (
        "window",
        f"late IDEA, one prune at 62.5% {EQUAL}",
        minus(when, "idea_50_75", "oneshot_625"),
    )
    yield "window", "one prune ends higher, the later it comes", slopes([*places.values()], once)
    new = {arm: {seed: row for seed, row in muon[arm].items() if seed > 33} for arm in muon}
    yield "window, Muon", f"{SMALL} early IDEA, same tokens", minus(new, "scratch", "idea_10_35")
    starts = s["start/usual"], s["start/width"]
    better = {  # the start with the lower mean
        arm: min((x[arm] for x in starts), key=lambda y: mean(r["val_loss"] for r in y.values()))
        for arm in ("idea", "scratch", "scratch_flops")
    }
    by_start = paired(*(arms["scratch_flops"] for arms in starts))
    yield "start", "small model lower from a start by width", by_start
    yield "start", f"better starts: {SMALL} IDEA, same FLOPs", minus(better, "scratch_flops")
    yield "start", "better starts: the same, same tokens", minus(better)
    sizes = [s[f"size/dictionary_36{size}"] for size in ("", "_250k", "_500k")]
    doublings = [-math.log2(arms["idea"][51]["params"]) for arms in sizes]
    yield "size", f"467k: {SMALL} IDEA, same tokens", minus(sizes[-1])
    yield "size", "IDEA's lead falls with each doubling", slopes(doublings, [*map(minus, sizes)])
    adamw, with_muon = minus(s["optimizer/adamw"]), minus(s["optimizer/muon"])
    yield "optimizer", f"AdamW: {SMALL} IDEA, same tokens", adamw
    yield "optimizer", "IDEA's lead is larger with Muon", [m - a for a, m in zip(adamw, with_muon)]
    for n in (142, 568, 1540):
        arms = s[f"tokens/dictionary_{n}"]
        yield "tokens", f"{n:,}: {SMALL} IDEA, same FLOPs", minus(arms, "scratch_flops")
    for optimizer, end in (("Muon", ""), ("AdamW", "_adamw")):
        each = [s[f"rising/rising_{n}{end}"] for n in (18, 36, 71, 142, 285)]
        runs = [next(iter(arms["idea"].values())) for arms in each]
        doublings = [math.log2(run["tokens"] / run["params"]) for run in runs]
        rise = slopes(doublings, [minus(arms, "scratch_flops") for arms in each])
        yield "rising", f"{optimizer}, same FLOPs: IDEA's lead rises with each doubling", rise
    warm = s["warm-up/warmup_10_250k"]
    yield "warm-up", f"263k, AdamW: {SMALL} IDEA, same tokens", minus(warm)
    yield "warm-up", "263k, AdamW: IDEA with 2.5% above 10%", minus(warm, "idea_short", "idea")
    speeches = [s["restart/speeches_142"], s["larger/speeches_16_250k"]]
    others = s["limited/epochs_47_float32"], s["first_edition/main"], late
    yield "", "restart", *map(restarts, [*speeches, *others])
    yield "", "restart, dictionary", restarts(s["tokens/dictionary_142"])
    yield "", "one prune minus many", *(minus(arms, "oneshot") for arms in speeches)
    yield "", "wide", minus(speeches[0], "scratch", "enlarged")
    yield "", "larger", minus(s["larger/share_25"], "scratch_flops")
    yield "", "units", minus(s["units/axes"], "all"), minus(s["units/axes_70k"], "all")
    yield "", "limited", minus(s["limited/epochs_47"], "scratch_flops")
    yield "", "teacher", minus(s["teacher/speeches_142"], "scratch_taught", "idea_taught")
    yield "", "warm-up, same FLOPs", minus(warm, "scratch_flops")
    yield "", "warm-up, small model", minus(warm, "scratch_short", "scratch")
    yield "", "ideas", minus(s["ideas/dictionary_142"], "window_2_10")


def claim_table(found: list[tuple[str, ...]]) -> str:
    """With p by Holm over the claims of a study, by two-sided paired t-tests, and verdicts."""

    def p_value(words: str, d: list[float]) -> float:
        ways = [[0.004 + x for x in d], [0.004 - x for x in d]] if EQUAL in words else [d]
        return max(map(t_test, ways)) / len(ways)

    text = "|study|claim|above 0|p|verdict|\n|---|---|---|---|---|\n"
    for study, words, d in found:
        each = sorted(p_value(*others) for name, *others in found if name == study)
        holm = [*accumulate((min(1, (len(each) - i) * p) for i, p in enumerate(each)), max)]
        p = holm[each.index(p_value(words, d))]
        verdict = "holds" if mean(d) > 0 or EQUAL in words else "**contradicted**"
        shown = f"{p:.2g}" if p >= 0.001 else "<0.001"
        text += f"|{study}|{words}|{effect(d)}|{shown}|{verdict if p < 0.05 else 'cannot tell'}|\n"
    return text


@command
def main(argv: list[str] | None = None) -> None:
    settings = read()
    found, made = [*leads(settings)], [*comparisons(settings)]
    print(main_table(found), claim_table([x for x in made if x[0]]), sep="\n")
    print(*(f"{words}: {effect(*tests)}" for study, words, *tests in made if not study), sep="\n")
    save(law(points(found)), "docs/results.png")


if __name__ == "__main__":
    sys.exit(main())
