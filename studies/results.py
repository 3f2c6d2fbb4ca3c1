"""All comparisons together: python -m studies.results (needs requirements-extra.txt)

Prints their table (studies/README.md), and that of IDEA against the small model in each setting;
draws docs/results.png and, with its settings, settings.png. A setting is a text, a shape and a
number of tokens, with two seeds or more of two arms. A mean is over settings of one size (of the
restart: of two), which weigh the same. Its 95% interval comes from how seeds spread within settings
(Satterthwaite's degrees of freedom), or of three or more, from Student's t over their means, if
that is wider.

Left out: `dictionary_142_untuned` (`dictionary_142` has better rates); `speeches_16_870k` (its seed
chose its rate); other methods and enlarged widths; runs of a setting again; window/plateau.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, variance
from typing import NamedTuple

from data.command import command
from docs.pictures import forest, leads, save
from tools.compare import Arms, paired, read_csv, t_test

STUDIES = Path(__file__).parent
TRAIN = {"speeches": 3_949_534, "dictionary": 15_512_332}  # tokens of the training split
TRAIN |= {"speeches, 4%": 172_512, "speeches, 17%": 690_048}
# STUDY/SETTING with Muon, as in its runs.csv -> its text; those of size/ and tokens/, too
TEXTS = {"restart/speeches_142": "speeches", "larger/speeches_16_250k": "speeches"}
TEXTS |= {"units/axes_70k": "speeches"}
TEXTS |= {"limited/epochs_47": "speeches, 4%", "limited/epochs_12": "speeches, 17%"}
ARMS = {"scratch": "same tokens", "scratch_flops": "same FLOPs"}
SPEECHES = ["larger/speeches_16_250k", "restart/speeches_142", "limited/epochs_47_float32"]
SPEECHES += ["first_edition/main", "window/late"]
# Final parameters, tokens for each, optimizer, when units go (share of the run), where the runs are
RESTARTS = [
    ("58k, 250k", "16 to 570, speeches", "both", "10 to 50%", SPEECHES),
    ("58k", "142, dictionary", "Muon", "10 or 25%", ["tokens/dictionary_142"]),
]
LATE, ADAMW = "window/late,window/when", "size/dictionary_36_250k_adamw"
SMALL_MODELS = [  # with Muon: all of that size that have so many tokens
    ("58k", "18", "Muon", "10 to 35%", range(30)),
    ("250k", "16", "Muon", "10 to 35%", range(30)),
    ("58k", "36", "Muon", "10 to 35%", range(30, 50)),
    ("58k", "71 to 142", "Muon", "10 to 35%", range(50, 150)),
    ("70k", "59", "Muon", "10 to 35%", range(30, 150)),
    ("250k", "65 to 142", "Muon", "10 to 35%", range(30, 150)),
    ("263k", "36", "Muon", "10 to 35%", range(30, 150)),
    ("467k", "36", "Muon", "10 to 35%", range(30, 150)),
    ("58k", "570", "Muon", "10 to 35%", "window/muon idea_10_35 scratch"),
    ("58k", "142", "AdamW", "10 to 35%", "optimizer idea_adamw scratch_adamw scratch_flops_adamw"),
    ("263k", "36", "AdamW", "10 to 35%", ADAMW + " idea scratch scratch_flops"),
    ("58k", "570", "AdamW", "10 to 35%", "window/when idea_10_35 scratch scratch_flops_10_35"),
    ("58k", "570", "AdamW", "50 to 75%", LATE + " idea_50_75 scratch scratch_flops"),
    ("58k", "570 and more", "Muon", "25 to 50%", range(150, 2000)),
    ("250k", "570", "Muon", "25 to 50%", range(150, 2000)),
]


class Effect(NamedTuple):
    """Of two things compared, the second's loss minus the first's, in nats per token."""

    tests: list[list[float]]  # by seed
    pairs: str  # above 0
    mean: float
    low: float  # of the 95% interval
    high: float
    p: float


def effect(tests: list[list[float]]) -> Effect:
    from scipy.stats import t

    tests = [d for d in tests if len(d) > 1]
    means, k = [mean(d) for d in tests], len(tests)
    v = [variance(d) / len(d) for d in tests]
    freedom = sum(v) ** 2 / sum(x**2 / (len(d) - 1) for x, d in zip(v, tests))
    ways = [(math.sqrt(sum(v)) / k, freedom)]  # a standard error, its degrees of freedom
    if k > 2:
        ways.append((math.sqrt(variance(means) / k), k - 1))
    half = max(error * t.ppf(0.975, df) for error, df in ways)
    p = max(2 * t.sf(abs(mean(means)) / error, df) for error, df in ways)
    pairs = f"{sum(x > 0 for d in tests for x in d)} of {sum(map(len, tests))}"
    return Effect(tests, pairs, mean(means), mean(means) - half, mean(means) + half, p)


def read(name: str) -> Arms:
    """The runs of a STUDY, or of a STUDY/SETTING."""
    study, _, setting = name.partition("/")
    return read_csv(STUDIES / study / "runs.csv")[setting]


def small_model_tests() -> list[tuple]:
    """(final parameters, text), tokens for each, setting, arm -> its losses minus IDEA's."""
    found = []
    texts = TEXTS | {
        f"{study}/{name}": name.partition("_")[0]
        for study in ("size", "tokens")
        for name in read_csv(STUDIES / study / "runs.csv")
        if not name.endswith("_adamw")
    }
    for name, text in texts.items():
        arms = read(name)
        run = next(iter(arms["idea"].values()))
        pairs = {arm: paired(arms[arm], arms["idea"]) for arm in ARMS if arm in arms}
        found.append(((run["params"], text), run["tokens"] / run["params"], name, pairs))
    return sorted(found, key=lambda test: test[:3])


def small_model_table(found: list[tuple]) -> str:
    heads = ["final parameters", "text", "tokens for each", "epochs", *ARMS.values(), "setting"]
    lines = [heads, ["---"] * len(heads)]
    for (params, text), tokens, name, pairs in found:
        cells = [f"{params:,}", text, f"{tokens:.0f}", f"{tokens * params / TRAIN[text]:.1f}"]
        for d in (pairs.get(arm, []) for arm in ARMS):
            cells.append(f"{mean(d):+.4f} ({len(d)} seeds, p = {t_test(d):.2g})" if d else "")
        lines.append([*cells, f"`{name}`"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def restarts(name: str) -> list[float]:
    """naive minus one shot by seed, the mean of all places where both prune (their FLOPs tell)."""
    arms = read(name)
    flops = {name: next(iter(runs.values()))["flops"] for name, runs in arms.items()}
    naive, once = ([a for a in arms if a.startswith(start)] for start in ("naive", "oneshot"))
    pairs = [(a, b) for a in naive for b in once if flops[a] == flops[b] and a != "naive_gentle"]
    places = [paired(arms[a], arms[b]) for a, b in pairs]
    return [mean(of_seed) for of_seed in zip(*places, strict=True)]


def rows(found: list[tuple]) -> Iterator[tuple[list[str], Effect]]:
    """What is compared, size, tokens, optimizer, when units go; and what came out."""
    for *where, names in RESTARTS:
        tests = [*map(restarts, names)]
        yield ["One cosine, against a restart after one prune", *where], effect(tests)
    for i, (arm, words) in enumerate(ARMS.items()):
        for *where, runs in SMALL_MODELS:
            if isinstance(runs, range):
                size = [t for t in found if f"{round(t[0][0] / 1000)}k" == where[0]]
                some = [t for t in size if round(t[1]) in runs and "untuned" not in t[2]]
                tests = [d[arm] for *_, d in some if arm in d]
                if not tests:
                    continue
            else:
                names, idea, *small = runs.split()
                if i == len(small):
                    continue  # not run
                every = map(read, names.split(","))
                pairs = [paired(arms.get(small[i], {}), arms[idea]) for arms in every]
                tests = [sum(pairs, [])]  # one test, of all seeds
            yield [f"IDEA, against the small model: {words}", *where], effect(tests)


def table(made: list[tuple[list[str], Effect]]) -> str:
    heads = "compared|final parameters|tokens for each|optimizer|pruned at|settings|pairs above 0"
    text = f"|{heads}|mean|95%|p|\n{'|---' * 10}|\n"
    for (compared, *words), e in made:
        text += f"|{'' if compared in text else compared}|{'|'.join(words)}|{len(e.tests)}"
        text += f"|{e.pairs}|{e.mean:+.3f}"
        text += f"|{e.low:+.3f} to {e.high:+.3f}|{e.p:.2g}|\n"
    return text


@command
def main(argv: list[str] | None = None) -> None:
    found = small_model_tests()
    made = list(rows(found))
    print(table(made), small_model_table(found), sep="\n", end="")
    save(leads(made), "docs/results.png")
    save(forest(made), "studies/settings.png")


if __name__ == "__main__":
    sys.exit(main())
