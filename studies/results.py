"""The evidence: python -m studies.results (needs requirements-extra.txt)

It prints the tables of studies/README.md, all made from runs.csv, and draws docs/results.png. A
comparison is what one study has of a text, a shape, a number of tokens, an optimizer and a window.
In a mean over comparisons, all weigh the same. Its 95% interval comes from how seeds spread within
them (Satterthwaite's degrees of freedom), or of three or more, from Student's t over their means,
if that is wider. To add runs of tools.compare, put study, setting, text, optimizer and window
before each line of its runs.csv.
"""

import csv
import math
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from statistics import linear_regression, mean, variance
from typing import NamedTuple

from data.command import command
from docs.pictures import law, save
from tools.compare import COLUMNS, Arms, paired, t_test

STUDIES = Path(__file__).parent
# Not against the small model alone: the same seeds again, other methods, widths, curves or starts
OTHERS = "challenge course first_edition ideas teacher units/axes larger/share_25 larger/share_75"
# Rows of the table: sizes in thousands, tokens for each final parameter, optimizer, windows
ROWS = [
    ("58k, 250k", (16, 18), "Muon", "10 to 35%"),
    ("58k", (36, 36), "Muon", "10 to 35%"),
    ("263k, 467k", (36, 36), "Muon", "10 to 35%"),
    ("70k, another shape", (59, 59), "Muon", "10 to 35%"),
    ("250k", (65, 142), "Muon", "10 to 35%"),
    ("58k", (71, 284), "Muon", "10 to 35%"),
    ("58k", (570, 570), "Muon", "10 to 35%"),
    ("58k, 250k", (569, 1540), "Muon", "25 to 50%"),
    ("58k", (142, 142), "AdamW", "10 to 35%"),
    ("263k", (36, 36), "AdamW", "10 to 35%"),
    ("58k", (570, 570), "AdamW", "10 to 35%"),
    ("58k", (570, 570), "AdamW", "50 to 75%"),
]


class Effect(NamedTuple):
    """Of two things compared, the second's loss minus the first's, in nats per token."""

    tests: list[list[float]]  # by seed
    pairs: str  # above 0
    mean: float
    low: float  # of the 95% interval
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f}), {self.pairs}"


class Lead(NamedTuple):
    """How far IDEA ends below the small model."""

    tokens: int  # for each final parameter
    size: str  # in final parameters
    optimizer: str
    window: str
    arm: str
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
    p = max(2 * t.sf(abs(mean(means)) / error, df) for error, df in ways)
    pairs = f"{sum(x > 0 for d in tests for x in d)} of {sum(map(len, tests))}"
    return Effect([*tests], pairs, mean(means), mean(means) - half, mean(means) + half, p)


def read() -> dict[str, Arms]:
    """STUDY/SETTING -> its arms."""
    settings: dict[str, Arms] = {}
    with open(STUDIES / "runs.csv", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            arms = settings.setdefault(f"{line['study']}/{line['setting']}", {})
            row = line | {key: kind(line[key] or 0) for key, kind in COLUMNS.items()}
            arms.setdefault(row["arm"], {})[row["seed"]] = row
    return settings


def leads(settings: dict[str, Arms]) -> Iterator[Lead]:
    for name, arms in settings.items():
        if name in OTHERS or name.partition("/")[0] in OTHERS.split():
            continue
        for arm, runs in arms.items():
            one = next(iter(runs.values()))
            each, size = round(one["tokens"] / one["params"]), f"{one['params'] / 1000:.0f}k"
            optimizer = {"muon": "Muon", "adamw": "AdamW"}[one["optimizer"]]
            where = each, size, optimizer, f"{one['window'].replace('-', ' to ')}%", arm
            for small, its_runs in arms.items():
                if not arm.startswith("idea") or not small.startswith("scratch"):
                    continue
                other = next(iter(its_runs.values()))
                if other["tokens"] == one["tokens"]:
                    yield Lead(*where, "same tokens", paired(its_runs, runs))
                elif math.isclose(other["flops"], one["flops"], rel_tol=2e-3):
                    yield Lead(*where, "same FLOPs", paired(its_runs, runs))


def points(found: list[Lead]) -> dict[Lead, Effect]:
    """The comparisons of one size, number of tokens, optimizer and window together."""
    together: dict[Lead, list] = {}
    for lead in found:
        arm = lead.arm if lead.arm == "idea_low" else "idea"
        key = lead._replace(arm=arm, differences=None)
        together.setdefault(key, []).append(lead.differences)
    return {key: effect(*tests) for key, tests in sorted(together.items())}


def main_table(found: list[Lead]) -> str:
    heads = "final parameters|tokens for each|optimizer|pruned at|on the same tokens|same FLOPs"
    text = f"|{heads}|\n{'|---' * 6}|\n"
    for sizes, (low, high), optimizer, window in ROWS:
        some = [
            lead
            for lead in found
            if lead.size in sizes.replace(",", "").split()
            and low <= lead.tokens <= high
            and (lead.optimizer, lead.window) == (optimizer, window)
            and lead.arm != "idea_low"
        ]
        each = sorted({lead.tokens for lead in some})
        cells = [sizes, " to ".join(f"{x:,}" for x in each[:: max(1, len(each) - 1)])]
        cells += [optimizer, window]
        for part in ("same tokens", "same FLOPs"):
            tests = [lead.differences for lead in some if lead.part == part]
            cells.append(str(effect(*tests)) if tests else "")
        text += f"|{'|'.join(cells)}|\n"
    return text


def restarts(arms: Arms) -> list[float]:
    """naive minus one shot by seed, the mean of all places where both prune (their FLOPs tell)."""
    flops = {name: next(iter(runs.values()))["flops"] for name, runs in arms.items()}
    naive, once = ([a for a in arms if a.startswith(start)] for start in ("naive", "oneshot"))
    places = [paired(arms[a], arms[b]) for a in naive for b in once if flops[a] == flops[b]]
    return [mean(of_seed) for of_seed in zip(*places, strict=True)]


def slopes(x: list[float], y: list[list[float]]) -> list[float]:
    """By seed, the least-squares slope over x. y: for each x, a number of each seed."""
    return [linear_regression(x, of_seed).slope for of_seed in zip(*y, strict=True)]


def minus(arms: Arms, small: str = "scratch", idea: str = "idea") -> list[float]:
    return paired(arms[small], arms[idea])


def asked(s: dict[str, Arms]) -> dict[str, list[list[float]]]:
    """Question of the page -> what it compares, by seed."""
    speeches = "restart/speeches_142 larger/speeches_16_250k limited/epochs_47_float32"
    speeches = [s[name] for name in f"{speeches} first_edition/main window/late".split()]
    by_start = [s["start/usual"], s["start/width"]]
    better = {  # the start with the lower mean
        arm: min((x[arm] for x in by_start), key=lambda y: mean(r["val_loss"] for r in y.values()))
        for arm in ("idea", "scratch", "scratch_flops")
    }
    sizes = [s[f"size/dictionary_36{size}"] for size in ("", "_250k", "_500k")]
    doublings = [math.log2(arms["idea"][51]["params"]) for arms in sizes]
    both = [minus(s[f"optimizer/{name}"]) for name in ("adamw", "muon")]
    axes = s["units/axes"], s["units/axes_70k"]
    return {
        "late": [minus(s["window/when"], "idea_50_75", "idea_10_35")],
        "restart": [*map(restarts, speeches)],
        "restart, dictionary": [restarts(s["tokens/dictionary_142"])],
        "one prune": [minus(arms, "oneshot") for arms in speeches[:2]],
        "wide": [minus(speeches[0], "scratch", "enlarged")],
        "optimizer": [[m - a for a, m in zip(*both, strict=True)]],
        "start, tokens": [minus(better)],
        "start, FLOPs": [minus(better, "scratch_flops")],
        "start, small": [paired(*(x["scratch_flops"] for x in by_start))],
        "size": [slopes(doublings, [minus(arms) for arms in sizes])],
        "larger": [minus(s["larger/share_25"], "scratch_flops")],
        "units": [minus(arms, "all") for arms in axes],
        "limited": [minus(s["limited/epochs_47"], "scratch_flops")],
        "teacher": [minus(s["teacher/speeches_142"], "scratch_taught", "idea_taught")],
        "ideas": [minus(s["ideas/dictionary_142"], "window_2_10")],
    }


def claims(s: dict[str, Arms]) -> Iterator[tuple[str, str, list[float], float]]:
    """Those fixed before their runs: study, claim, what it says is above 0, by seed; and p."""
    found = {key: tests[0] for key, tests in asked(s).items()}
    late, when, muon = (s[f"window/{name}"] for name in ("late", "when", "muon"))
    places = {"oneshot_25": 0.25, "oneshot_50": 0.5, "oneshot_625": 0.625, "oneshot_75": 0.75}
    once = [[when[arm][seed]["val_loss"] for seed in when[arm]] for arm in places]
    new = {
        arm: {seed: runs[seed] for seed in range(34, 38)}
        for arm, runs in muon.items()
        if len(runs) > 3
    }
    made = [
        (
            "window, late",
            "a restart ends above one prune at 50%",
            minus(late, "naive_50", "oneshot_50"),
        ),
        (
            "window, late",
            "one prune at 50% ends above IDEA",
            minus(late, "oneshot_50", "idea_50_75"),
        ),
        ("window, late", "small model, same tokens", minus(late, "scratch", "idea_50_75")),
        ("window, late", "small model, same FLOPs", minus(late, "scratch_flops", "idea_50_75")),
        ("window, when", "a window at 50 to 75% ends above one at 10 to 35%", found["late"]),
        ("window, when", "small model, same tokens", minus(when, "scratch", "idea_10_35")),
        (
            "window, when",
            "one prune at 62.5% and seven ones differ by less than 0.004",
            minus(when, "idea_50_75", "oneshot_625"),
        ),
        (
            "window, when",
            "one prune ends higher, the later it comes",
            slopes([*places.values()], once),
        ),
        ("window, Muon", "small model, same tokens", minus(new, "scratch", "idea_10_35")),
        (
            "start",
            "the small model, same FLOPs, has a better start by width",
            found["start, small"],
        ),
        ("start", "each from its better start, same FLOPs", found["start, FLOPs"]),
        ("start", "each from its better start, same tokens", found["start, tokens"]),
        ("size", "467k, same tokens", minus(s["size/dictionary_36_500k"])),
        ("size", "the lead falls with each doubling", [-x for x in found["size"]]),
        ("optimizer", "AdamW, same tokens", minus(s["optimizer/adamw"])),
        ("optimizer", "the lead is larger with Muon", found["optimizer"]),
        *(
            (
                "tokens",
                f"{n} tokens, same FLOPs",
                minus(s[f"tokens/dictionary_{n}"], "scratch_flops"),
            )
            for n in (142, 568, 1540)
        ),
    ]
    for study, words, d in made:
        bound = 0.004 if "less than" in words else None  # then two one-sided tests, the larger p
        ways = [[bound + x for x in d], [bound - x for x in d]] if bound else [d]
        yield study, words, d, max(t_test(way) for way in ways) / len(ways)


def claim_table(found: list[tuple[str, str, list[float], float]]) -> str:
    text = "|study|claim|above 0|p, by Holm|verdict|\n|---|---|---|---|---|\n"
    for study, words, d, p in found:
        others = sorted(q for name, *_, q in found if name == study)
        holm = [*accumulate(((len(others) - i) * q for i, q in enumerate(others)), max)]
        p, e = min(1, holm[others.index(p)]), effect(d)
        verdict = "holds" if e.mean > 0 or "less than" in words else "**contradicted**"
        verdict = verdict if p < 0.05 else "cannot tell"
        text += f"|{study}|{words}|{e}|{f'{p:.2g}' if p >= 0.001 else '<0.001'}|{verdict}|\n"
    return text


@command
def main(argv: list[str] | None = None) -> None:
    settings = read()
    found = [*leads(settings)]
    print(main_table(found), claim_table([*claims(settings)]), sep="\n")
    for question, tests in asked(settings).items():
        print(f"{question}: {effect(*tests)}")
    save(law(points(found)), "docs/results.png")


if __name__ == "__main__":
    sys.exit(main())
