"""The tables of README.md, from runs.csv: python -m studies.results

It needs requirements-extra.txt. A comparison is what a study has of one text, shape,
number of tokens, optimizer and window. To add runs of tools.compare, put study,
setting, text, optimizer and window before each line of its runs.csv.
"""

import csv
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import linear_regression, mean, variance
from typing import NamedTuple

from data.command import command
from tools.compare import COLUMNS, Arms, paired, t_test

# No row of the main table counts these: they repeat seeds, change the method or its
# widths, or have a weak base
LEFT_OUT = {
    "challenge",
    "course",
    "first_edition",
    "ideas",
    "teacher",
    "warm-up",
    "larger/share_25",
    "larger/share_75",
    "rising/rising_18_adamw",
    "rising/rising_36_adamw",
    "units/axes",
}


class Row(NamedTuple):
    """A row of the main table: the comparisons that it averages."""

    sizes: str
    tokens: range  # for each final parameter
    optimizer: str
    window: str


ROWS = (
    Row("58k, 250k", range(16, 19), "Muon", "10-35"),
    Row("58k", range(30, 50), "Muon", "10-35"),
    Row("263k, 467k", range(30, 50), "Muon", "10-35"),
    Row("70k, another shape", range(50, 60), "Muon", "10-35"),
    Row("250k", range(60, 150), "Muon", "10-35"),
    Row("58k", range(60, 80), "Muon", "10-35"),
    Row("58k", range(100, 300), "Muon", "10-35"),
    Row("58k", range(500, 600), "Muon", "10-35"),
    Row("58k, 250k", range(500, 2000), "Muon", "25-50"),
    Row("58k", range(60, 80), "AdamW", "10-35"),
    Row("58k", range(100, 300), "AdamW", "10-35"),
    Row("263k", range(30, 50), "AdamW", "10-35"),
    Row("58k", range(500, 600), "AdamW", "10-35"),
    Row("58k", range(500, 600), "AdamW", "50-75"),
)
SMALL = "small model above"
RISES = "IDEA's lead rises with each doubling"
EQUAL = "differ by less than 0.004"  # such a claim takes two one-sided tests
MARGIN = 0.004

# The settings rising_18, rising_36, ... of runs.csv, and what their names end with
RISING = (18, 36, 71, 142, 285)  # tokens for each final parameter
LONG_WARM_UP = "AdamW, warm-up 10%"
SHORT_WARM_UP = "AdamW, warm-up 2.5%"
SERIES = {"Muon": "", LONG_WARM_UP: "_adamw_warm", SHORT_WARM_UP: "_adamw"}

Comparison = tuple  # study, claim, and for each comparison the differences by seed


class Effect(NamedTuple):
    """The loss of the second of two things minus the first's, in nats per token."""

    tests: tuple[list[float], ...]  # of each comparison, by seed
    pairs: str  # above 0
    mean: float
    low: float  # of the 95% interval
    high: float

    def __str__(self) -> str:
        interval = f"({self.low:+.3f} to {self.high:+.3f})"
        return f"{self.mean:+.3f} {interval}, {self.pairs}"


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
    """The mean over comparisons, which all weigh the same, with its interval.

    The interval comes from how seeds spread within comparisons, with Satterthwaite's
    degrees of freedom. With three or more comparisons, it comes from Student's t over
    their means, if that is wider.
    """
    from scipy.stats import t

    means = [mean(d) for d in tests]
    variances = [variance(d) / len(d) for d in tests]
    freedom = [len(d) - 1 for d in tests]
    spread = sum(x**2 / df for x, df in zip(variances, freedom))
    of_seeds = sum(variances) ** 2 / spread
    error = math.sqrt(sum(variances)) / len(tests)
    half = error * t.ppf(0.975, of_seeds)
    if len(tests) > 2:
        error = math.sqrt(variance(means) / len(tests))
        half = max(half, error * t.ppf(0.975, len(tests) - 1))
    above = sum(count_above(d) for d in tests)
    pairs = f"{above} of {sum(map(len, tests))}"
    center = mean(means)
    return Effect(tests, pairs, center, center - half, center + half)


def count_above(differences: list[float]) -> int:
    return sum(x > 0 for x in differences)


def read() -> dict[str, Arms]:
    """STUDY/SETTING -> its arms."""
    settings: dict[str, Arms] = {}
    path = Path(__file__).parent / "runs.csv"
    with open(path, encoding="utf-8") as file:
        for line in csv.DictReader(file):
            numbers = {key: kind(line[key] or 0) for key, kind in COLUMNS.items()}
            row = line | numbers
            arms = settings.setdefault(f"{line['study']}/{line['setting']}", {})
            arms.setdefault(row["arm"], {})[row["seed"]] = row
    return settings


def first_run(runs: dict[int, dict]) -> dict:
    """The row of an arm's first seed. All its seeds share tokens, FLOPs and size."""
    return next(iter(runs.values()))


def minus(arms: Arms, small: str = "scratch", idea: str = "idea") -> list[float]:
    return paired(arms[small], arms[idea])


def equal_part(one: dict, other: dict) -> str | None:
    """What two runs have in common, tokens or FLOPs, or None."""
    if one["tokens"] == other["tokens"]:
        return "same tokens"
    if math.isclose(one["flops"], other["flops"], rel_tol=2e-3):
        return "same FLOPs"
    return None


def leads(settings: dict[str, Arms]) -> Iterator[Lead]:
    """All comparisons of IDEA with a small model on its tokens, or its FLOPs."""
    for name, arms in settings.items():
        study = name.partition("/")[0]
        if study in LEFT_OUT or name in LEFT_OUT:
            continue
        small_arms = [arm for arm in arms if arm.startswith("scratch")]
        for idea in arms:
            if not idea.startswith("idea"):
                continue
            run = first_run(arms[idea])
            for small in small_arms:
                part = equal_part(run, first_run(arms[small]))
                if part is None:
                    continue
                yield Lead(
                    tokens=round(run["tokens"] / run["params"]),
                    size=f"{run['params'] / 1000:.0f}k",
                    optimizer=run["optimizer"],
                    window=run["window"],
                    low=idea == "idea_low",
                    part=part,
                    differences=minus(arms, small, idea),
                )


def in_row(lead: Lead, row: Row) -> bool:
    if lead.low or lead.tokens not in row.tokens:
        return False
    if lead.size not in row.sizes.replace(",", "").split():
        return False
    return (lead.optimizer, lead.window) == (row.optimizer, row.window)


def main_table(found: list[Lead]) -> str:
    lines = [
        "|final parameters|tokens for each|optimizer|pruned at"
        "|on the same tokens|same FLOPs|",
        "|---" * 6 + "|",
    ]
    for row in ROWS:
        here = [lead for lead in found if in_row(lead, row)]
        tokens = sorted({lead.tokens for lead in here})
        ends = f"{tokens[0]:,}"
        if len(tokens) > 1:
            ends += f" to {tokens[-1]:,}"
        window = row.window.replace("-", " to ") + "%"
        cells = [row.sizes, ends, row.optimizer, window]
        for part in ("same tokens", "same FLOPs"):
            tests = [lead.differences for lead in here if lead.part == part]
            cells.append(str(effect(*tests)) if tests else "")
        lines.append(f"|{'|'.join(cells)}|")
    return "\n".join(lines) + "\n"


def rising(settings: dict[str, Arms], series: str) -> dict[int, list[float]]:
    """IDEA's lead on the same FLOPs by seed, for each number of tokens that has run."""
    found = {}
    for tokens in RISING:
        setting = f"/rising_{tokens}{SERIES[series]}"
        for name, arms in settings.items():
            if name.endswith(setting):
                found[tokens] = minus(arms, "scratch_flops")
    if series == SHORT_WARM_UP:
        found[570] = minus(settings["window/when"], "scratch_flops_10_35", "idea_10_35")
    return found


def rising_table(settings: dict[str, Arms]) -> str:
    """IDEA's lead on the same FLOPs by tokens, at 58k on the speeches."""
    columns = (*RISING, 570)
    lines = [
        f"|tokens for each final parameter|{'|'.join(map(str, columns))}|",
        "|---" * (len(columns) + 1) + "|",
    ]
    for series in SERIES:
        found = rising(settings, series)
        means, counts = [], []
        for tokens in columns:
            d = found.get(tokens)
            means.append(f"{mean(d):+.3f}" if d else "")
            counts.append(f"{count_above(d)} of {len(d)}" if d else "")
        lines.append(f"|{series}: IDEA's lead, mean|{'|'.join(means)}|")
        lines.append(f"|{series}: IDEA ends lower|{'|'.join(counts)}|")
    return "\n".join(lines) + "\n"


def slopes(x: list[float], y: list[list[float]]) -> list[float]:
    """By seed, the least-squares slope over x. y: for each x, a number of each seed."""
    return [linear_regression(x, of_seed).slope for of_seed in zip(*y, strict=True)]


def restarts(arms: Arms) -> list[float]:
    """naive minus one shot, by seed: the mean of all places where both prune.

    Both prune at the same step if their FLOPs are equal.
    """
    flops = {name: first_run(runs)["flops"] for name, runs in arms.items()}
    places = []
    for naive in arms:
        for once in arms:
            is_pair = naive.startswith("naive") and once.startswith("oneshot")
            if is_pair and flops[naive] == flops[once]:
                places.append(minus(arms, naive, once))
    return [mean(of_seed) for of_seed in zip(*places, strict=True)]


def comparisons(settings: dict[str, Arms]) -> Iterator[Comparison]:
    """Study, claim, and by seed what it says is above 0, of claims fixed before their
    runs; then "", a name, and what else the page quotes."""
    yield from window_claims(settings)
    yield from start_claims(settings)
    yield from size_claims(settings)
    yield from optimizer_claims(settings)
    yield from token_claims(settings)
    yield from rising_claims(settings)
    yield from warm_up_claims(settings)
    yield from other_comparisons(settings)


def window_claims(settings: dict[str, Arms]) -> Iterator[Comparison]:
    late = settings["window/late"]
    restart = minus(late, "naive_50", "oneshot_50")
    once = minus(late, "oneshot_50", "idea_50_75")
    tokens = minus(late, "scratch", "idea_50_75")
    flops = minus(late, "scratch_flops", "idea_50_75")
    yield "late window", "a restart after one prune costs", restart
    yield "late window", "one prune ends above IDEA", once
    yield "late window", f"{SMALL} IDEA, same tokens", tokens
    yield "late window", f"{SMALL} IDEA, same FLOPs", flops

    when = settings["window/when"]
    windows = minus(when, "idea_50_75", "idea_10_35")
    tokens = minus(when, "scratch", "idea_10_35")
    once = minus(when, "idea_50_75", "oneshot_625")
    places = {"25": 0.25, "50": 0.5, "625": 0.625, "75": 0.75}
    losses = []
    for place in places:
        runs = when[f"oneshot_{place}"]
        losses.append([row["val_loss"] for row in runs.values()])
    later = slopes(list(places.values()), losses)
    yield "window", "late IDEA ends above early IDEA", windows
    yield "window", f"{SMALL} early IDEA, same tokens", tokens
    yield "window", f"late IDEA, one prune at 62.5% {EQUAL}", once
    yield "window", "one prune ends higher, the later it comes", later

    muon = settings["window/muon"]
    new = {}  # the claim came after the seeds up to 33
    for arm, runs in muon.items():
        new[arm] = {seed: row for seed, row in runs.items() if seed > 33}
    tokens = minus(new, "scratch", "idea_10_35")
    yield "window, Muon", f"{SMALL} early IDEA, same tokens", tokens


def mean_loss(runs: dict[int, dict]) -> float:
    return mean(row["val_loss"] for row in runs.values())


def start_claims(settings: dict[str, Arms]) -> Iterator[Comparison]:
    usual = settings["start/usual"]
    by_width = settings["start/width"]
    better = {}  # the start with the lower mean
    for arm in ("idea", "scratch", "scratch_flops"):
        better[arm] = min(usual[arm], by_width[arm], key=mean_loss)
    lower = paired(usual["scratch_flops"], by_width["scratch_flops"])
    flops = minus(better, "scratch_flops")
    yield "start", "small model lower from a start by width", lower
    yield "start", f"better starts: {SMALL} IDEA, same FLOPs", flops
    yield "start", "better starts: the same, same tokens", minus(better)


def size_claims(settings: dict[str, Arms]) -> Iterator[Comparison]:
    names = ("dictionary_36", "dictionary_36_250k", "dictionary_36_500k")
    sizes = [settings[f"size/{name}"] for name in names]
    falls = [-math.log2(first_run(arms["idea"])["params"]) for arms in sizes]
    slope = slopes(falls, [minus(arms) for arms in sizes])
    yield "size", f"467k: {SMALL} IDEA, same tokens", minus(sizes[-1])
    yield "size", "IDEA's lead falls with each doubling", slope


def optimizer_claims(settings: dict[str, Arms]) -> Iterator[Comparison]:
    adamw = minus(settings["optimizer/adamw"])
    muon = minus(settings["optimizer/muon"])
    larger = [m - a for a, m in zip(adamw, muon)]
    yield "optimizer", f"AdamW: {SMALL} IDEA, same tokens", adamw
    yield "optimizer", "IDEA's lead is larger with Muon", larger


def token_claims(settings: dict[str, Arms]) -> Iterator[Comparison]:
    for tokens in (142, 568, 1540):
        arms = settings[f"tokens/dictionary_{tokens}"]
        flops = minus(arms, "scratch_flops")
        yield "tokens", f"{tokens:,}: {SMALL} IDEA, same FLOPs", flops


def rising_claims(settings: dict[str, Arms]) -> Iterator[Comparison]:
    for series in ("Muon", SHORT_WARM_UP):
        claim = f"{series}, same FLOPs: {RISES}"
        yield "rising", claim, rise(settings, "rising", series)


def rise(settings: dict[str, Arms], study: str, series: str) -> list[float]:
    """By seed, how much IDEA's lead on its FLOPs rises with each doubling of tokens."""
    doublings = []
    differences = []
    for tokens in RISING:
        arms = settings[f"{study}/rising_{tokens}{SERIES[series]}"]
        run = first_run(arms["idea"])
        doublings.append(math.log2(run["tokens"] / run["params"]))
        differences.append(minus(arms, "scratch_flops"))
    return slopes(doublings, differences)


def warm_up_claims(settings: dict[str, Arms]) -> Iterator[Comparison]:
    arms = settings["warm-up/warmup_10_250k"]
    gain = minus(arms, "idea_short", "idea")
    slope = rise(settings, "warm-up", LONG_WARM_UP)
    yield "warm-up", f"263k, AdamW: {SMALL} IDEA, same tokens", minus(arms)
    yield "warm-up", "263k, AdamW: IDEA with 2.5% above 10%", gain
    yield "warm-up", f"58k, {LONG_WARM_UP}, same FLOPs: {RISES}", slope


def other_comparisons(settings: dict[str, Arms]) -> Iterator[Comparison]:
    speeches = settings["restart/speeches_142"]
    restarted = [
        restarts(speeches),
        restarts(settings["larger/speeches_16_250k"]),
        restarts(settings["limited/epochs_47_float32"]),
        restarts(settings["first_edition/main"]),
        restarts(settings["window/late"]),
    ]
    once = [
        minus(speeches, "oneshot"),
        minus(settings["larger/speeches_16_250k"], "oneshot"),
    ]
    units = [
        minus(settings["units/axes"], "all"),
        minus(settings["units/axes_70k"], "all"),
    ]
    warm = settings["warm-up/warmup_10_250k"]
    larger = minus(settings["larger/share_25"], "scratch_flops")
    limited = minus(settings["limited/epochs_47"], "scratch_flops")
    teacher = minus(settings["teacher/speeches_142"], "scratch_taught", "idea_taught")
    ideas = minus(settings["ideas/dictionary_142"], "window_2_10")
    yield "", "restart", *restarted
    yield "", "restart, dictionary", restarts(settings["tokens/dictionary_142"])
    yield "", "one prune minus many", *once
    yield "", "wide", minus(speeches, "scratch", "enlarged")
    yield "", "larger", larger
    yield "", "units", *units
    yield "", "limited", limited
    yield "", "teacher", teacher
    yield "", "warm-up, same FLOPs", minus(warm, "scratch_flops")
    yield "", "warm-up, small model", minus(warm, "scratch_short", "scratch")
    yield "", "ideas", ideas


def p_value(claim: str, differences: list[float]) -> float:
    """Of a two-sided paired t-test, or of two one-sided tests for a claim of EQUAL."""
    if EQUAL not in claim:
        return t_test(differences)
    above = t_test([MARGIN + x for x in differences])
    below = t_test([MARGIN - x for x in differences])
    return max(above, below) / 2


def holm(p_values: list[float]) -> list[float]:
    """The same p-values in the same order, corrected for their number."""
    corrected = list(p_values)
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    highest = 0.0
    for rank, i in enumerate(order):
        p = (len(p_values) - rank) * p_values[i]
        highest = max(highest, min(1, p))
        corrected[i] = highest
    return corrected


def claim_table(found: list[Comparison]) -> str:
    """The claims with p by Holm over the claims of a study, and their verdicts."""
    text = "|study|claim|above 0|p|verdict|\n|---|---|---|---|---|\n"
    by_study: dict[str, list[Comparison]] = {}
    for claim in found:
        by_study.setdefault(claim[0], []).append(claim)
    for study, claims in by_study.items():
        raw = [p_value(words, differences) for _, words, differences in claims]
        for (_, words, differences), p in zip(claims, holm(raw)):
            cells = [study, words, str(effect(differences)), shown(p)]
            cells.append(verdict(words, differences, p))
            text += f"|{'|'.join(cells)}|\n"
    return text


def shown(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else "<0.001"


def verdict(claim: str, differences: list[float], p: float) -> str:
    if p >= 0.05:
        return "cannot tell"
    if mean(differences) > 0 or EQUAL in claim:
        return "holds"
    return "**contradicted**"


@command
def main(argv: list[str] | None = None) -> None:
    settings = read()
    made = list(comparisons(settings))
    print(main_table(list(leads(settings))))
    print(rising_table(settings))
    print(claim_table([x for x in made if x[0]]))
    for study, words, *tests in made:
        if not study:
            print(f"{words}: {effect(*tests)}")


if __name__ == "__main__":
    sys.exit(main())
