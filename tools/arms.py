"""The arms of a comparison: where they come from, and which may be compared."""

from dataclasses import dataclass
from pathlib import Path

from run import UserError
from run.config import Config
from run.cost import Plan, n_parameters
from run.read_config import load_config, read_file
from tools.load import load_plan


@dataclass
class Arm:
    name: str
    path: str
    knobs: list[str]  # --key=value, for train.py
    config: Config
    plan: Plan


def read_arms(argument: str) -> dict[str, tuple[str, list[str]]]:
    """Name -> (config file, knobs), of the arms that an argument of the command line names.

    A config file is one arm. A table of arms assigns `base`, a config file, and `arms`, name ->
    {key: value}; FILE.py:NAME is one of them. Raises UserError.
    """
    path, colon, name = argument.partition(".py:")
    table = read_file(path + ".py" if colon else path)
    if not colon and "arms" not in table:
        return {Path(path).stem: (path, [])}
    try:
        base, arms = table["base"], table["arms"]
        names = [name] if colon else arms
        return {n: (base, [f"--{key}={value}" for key, value in arms[n].items()]) for n in names}
    except (KeyError, TypeError, AttributeError) as error:
        what = "a table of arms needs base = 'FILE.py', arms = {NAME: {key: value}}"
        raise UserError(f"{argument}: {what}; no such name, or no such table: {error}") from error


def load_arms(arguments: list[str], overrides: list[str], reference: str) -> list[Arm]:
    """The arms, every one with `overrides` on top, checked to be comparable with the reference.
    Raises UserError with the name of an arm that is not.
    """
    arms: dict[str, Arm] = {}
    for argument in arguments:
        for name, (path, changes) in read_arms(argument).items():
            if name in arms:
                raise UserError(f"{argument}: a second arm of the name {name}; rename one")
            try:
                knobs = [*changes, *overrides]
                arms[name] = Arm(name, path, knobs, *load_plan(load_config(path, knobs)))
            except UserError as error:
                raise UserError(f"arm {name}: {error}") from error
    if reference not in arms:
        raise UserError(f"--reference={reference}: not among the arms {', '.join(arms)}")
    for arm in arms.values():
        check_comparable(arm, arms[reference])
    return list(arms.values())


def check_comparable(arm: Arm, reference: Arm) -> None:
    """Raises UserError unless the arm ends in the reference's shape, on its tokens or its FLOPs; or
    keeps its enlarged shape to the end: the ceiling."""
    ours, theirs = arm.plan, reference.plan
    where = f"arm {arm.name}: not comparable with {reference.name}"
    ceiling = ours.final == ours.shape(1) == theirs.shape(1) != theirs.final
    if ours.final != theirs.final and not ceiling:
        sizes = f"{n_parameters(ours.final):,} and {n_parameters(theirs.final):,} parameters"
        raise UserError(f"{where}: ends in another shape ({sizes})")
    steps, ratio = arm.config.max_steps, theirs.flops() / ours.flops()
    tokens, wanted = (p.schedule.max_steps * p.tokens_per_step for p in (ours, theirs))
    # A step and a half may differ: --shorter also rounds the steps between prunes
    if tokens != wanted and abs(ratio - 1) * steps >= 1.5:
        way = f"max_steps={round(steps * ratio)} would make the FLOPs equal"
        raise UserError(f"{where}: neither its tokens nor its FLOPs; {way}")
