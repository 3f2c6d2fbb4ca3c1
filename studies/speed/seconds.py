"""Seconds of the arms of a comparison: python -m studies.speed.seconds RESULTS CONFIG ...

Bare steps of all arms take turns (tools.bench): without scoring, prunes, validation and saves. Only
the enlarged and the final shape are timed. For the widths between, time is assumed to grow linearly
with FLOPs. What a small model reaches in the seconds of an arm is interpolated between the losses
of scratch and scratch_flops in RESULTS/runs.csv (or extrapolated), over the logarithm of its steps.
Both must be among the CONFIGs.
"""

import argparse
import math
import sys
from pathlib import Path
from statistics import mean

import torch

from run import machine
from run.cost import flops_per_token
from tools import command
from tools.bench import Step, race
from tools.compare import Arm, load_arms
from tools.results import read_csv, t_test


def seconds_of_run(arm: Arm, wide: float, slim: float) -> float:
    """wide, slim: seconds of a step of the enlarged and of the final shape."""
    most, least = (flops_per_token(shape) for shape in (arm.plan.shape(1), arm.plan.final))
    flops = arm.plan.flops() / arm.plan.tokens_per_step  # summed over steps
    more = (flops - least * arm.config.max_steps) / (most - least) if most > least else 0.0
    return slim * arm.config.max_steps + (wide - slim) * more


def at_ratio(small: dict, longer: dict, ratio: float) -> dict[int, float]:
    """Seed -> loss of the small model in `ratio` times the steps of `small`, by the logarithm of
    the steps. small, longer: seed -> row."""
    losses = {}
    for seed in small.keys() & longer.keys():
        a, b = small[seed], longer[seed]
        share = math.log(ratio) / math.log(b["tokens"] / a["tokens"])
        losses[seed] = a["val_loss"] + (b["val_loss"] - a["val_loss"]) * share
    return losses


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, metavar="RESULTS")
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    args = parser.parse_args(argv)
    arms = {arm.name: arm for arm in load_arms(args.configs, [], "idea")}
    del arms["scratch_flops"]  # its steps are those of scratch
    scratch, runs = arms["scratch"], read_csv(args.results / "runs.csv")
    machine.keep_memory()
    device = torch.device("cpu")
    steps = [Step(arm.config, arm.plan.shape(1), device) for arm in arms.values()]
    times = dict(zip(arms, race(steps, repeats=9)))

    heads = ["arm", "enlarged step, ms", "FLOPs / scratch", "seconds / scratch"]
    heads += ["the small model after as many seconds, minus the arm (p)"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    flops, seconds = scratch.plan.flops(), times["scratch"] * scratch.config.max_steps
    for name, arm in arms.items():
        slim = times["scratch"] if arm.plan.schedule.window else times[name]
        ratio = seconds_of_run(arm, times[name], slim) / seconds
        cells = [name, f"{times[name] * 1e3:.0f}", f"{arm.plan.flops() / flops:.2f}"]
        cells += [f"{ratio:.2f}", ""]
        small = at_ratio(runs["scratch"], runs["scratch_flops"], ratio)
        if arm is not scratch and arm.plan.final == scratch.plan.final:
            pairs = [small[s] - row["val_loss"] for s, row in runs[name].items() if s in small]
            cells[-1] = f"{mean(pairs):+.4f} ({t_test(pairs):.2g})"
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
