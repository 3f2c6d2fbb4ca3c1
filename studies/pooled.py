"""All tests together: python -m studies.pooled

Random-effects means (Paule and Mandel, 1982), with 95% intervals by Knapp and Hartung (2003), never
narrower than without their factor. A test is a difference of two arms on two seeds or more; a text,
shape and number of tokens counts once. Needs SciPy (requirements-extra.txt).
"""

import math
from statistics import mean, variance

from studies.tokens.figure import STUDIES
from studies.tokens.figure import tests as small_model_tests
from tools.results import paired, read_csv

REGIMES = {"16 to 18": (0, 30), "36 to 142": (30, 150), "570 and more": (150, math.inf)}
RESTARTS = {"speeches": ("default", "lab", "limited/float32")}
RESTARTS |= {"a dictionary": ("tokens/dictionary_142",)}
LEFT_OUT = """Left out: `dictionary_142_untuned` (`dictionary_142` has better rates); `size` (its
seed chose its rate); other methods; runs of one of these tests again; AdamW (studies/optimizer,
studies/window and studies/first_edition)."""


def restarts(folder: str) -> list[list[float]]:
    """naive minus one shot by seed, where both prune at the same step: their FLOPs are the same."""
    arms = read_csv(STUDIES / folder / "runs.csv")
    flops = {name: next(iter(runs.values()))["flops"] for name, runs in arms.items()}
    naive, once = ([a for a in arms if a.startswith(start)] for start in ("naive", "oneshot"))
    return [paired(arms[a], arms[b]) for a in naive for b in once if flops[a] == flops[b]]


def pooled(tests: list[list[float]]) -> str:
    """Cells of a table: tests, pairs above 0, mean, interval, p. tests: differences by seed."""
    from scipy import optimize, stats

    tests = [d for d in tests if len(d) > 1]
    y, v, n = [mean(d) for d in tests], [variance(d) / len(d) for d in tests], len(tests)

    def fit(between: float) -> tuple[float, float, float]:
        """With this variance between tests: the mean, its variance, and Q / (n - 1)."""
        w = [1 / (x + between) for x in v]
        middle = sum(a * b for a, b in zip(w, y)) / sum(w)
        return middle, 1 / sum(w), sum(a * (b - middle) ** 2 for a, b in zip(w, y)) / (n - 1)

    spread = fit(0)[2] > 1  # more than by chance
    middle, error, q = fit(optimize.brentq(lambda x: fit(x)[2] - 1, 0, 1) if spread else 0.0)
    error = math.sqrt(error * max(1, q))
    low, high = (middle + sign * stats.t.ppf(0.975, n - 1) * error for sign in (-1, 1))
    p = 2 * stats.t.sf(abs(middle) / error, n - 1)
    cells = f"{n} | {sum(x > 0 for d in tests for x in d)} of {sum(map(len, tests))} | "
    return cells + f"{middle:+.3f} | {low:+.3f} to {high:+.3f} | {p:.2g}"


def main() -> None:
    print(f"| | tokens for each | tests | pairs above 0 | mean | 95% | p |\n|{' --- |' * 7}")
    for arm, words in (("scratch", "same tokens"), ("scratch_flops", "same FLOPs")):
        for regime, (low, high) in REGIMES.items():
            found = [test for test in small_model_tests() if "untuned" not in test[2]]
            some = [d[arm] for _, tokens, _, d in found if low < tokens < high and arm in d]
            print(f"| small model minus IDEA, {words} | {regime} | {pooled(some)} |")
    for text, folders in RESTARTS.items():
        print(f"| naive minus one shot, {text} | | {pooled(sum(map(restarts, folders), []))} |")
    print(f"\n{LEFT_OUT}")


if __name__ == "__main__":
    main()
