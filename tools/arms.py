"""The arms of a comparison: which configs may be compared, and what they share."""

from dataclasses import dataclass
from pathlib import Path

from data.loader import TokenDataset
from data.prepare import prepare_shipped
from run.config import Config, ConfigError, Plan, load_config, make_plan, match_flops, padded_vocab
from run.report import compact

# Knobs with no say in a step before the first prune is near.
PRUNE_KNOBS = {"d_ff_target", "n_kv_head_target", "criterion", "score_beta", "scope", "layer_floor"}
PRUNE_KNOBS |= {"prune_schedule", "prune_start", "prune_end", "prune_every", "round_to"}
PRUNE_KNOBS |= {"lr_restart", "restart_fraction", "max_steps", "out_dir"}


@dataclass
class Arm:
    name: str
    path: str
    knobs: list[str]  # --key=value for train.py
    config: Config  # with max_steps as match_flops makes it
    plan: Plan
    kind: str  # "same tokens", "same FLOPs" or "ceiling", seen from the reference


def load_arms(paths: list[str], overrides: list[str], reference: str) -> list[Arm]:
    """The arms, checked to be comparable with the reference. Raises ConfigError naming those that
    are not: all end in its shape on its tokens or its FLOPs; one that keeps its enlarged shape to
    the end is the ceiling.
    """
    arms = []
    for path in paths:
        c = load_config(path, overrides)
        if c.data_dir == Config.data_dir and not Path(c.data_dir).exists():
            prepare_shipped(Path(c.data_dir))
        data = TokenDataset(c.data_dir, "train", c.context_length)
        vocab_size = padded_vocab(c, data.vocab_size)
        equal_flops = c.match_flops != ""
        c = match_flops(c, vocab_size)
        kind = "same FLOPs" if equal_flops else "same tokens"
        arms.append(Arm(Path(path).stem, path, overrides, c, make_plan(c, vocab_size), kind))
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ConfigError(f"two arms of one name among {', '.join(names)}: rename a config")
    if reference not in names:
        raise ConfigError(f"--reference={reference}: not among the arms {', '.join(names)}")
    base = arms[names.index(reference)]
    for arm in arms:
        first, last = arm.plan.shapes[0][0], arm.plan.shapes[-1][0]
        if first == last == base.plan.shapes[0][0] != base.plan.shapes[-1][0]:
            arm.kind = "ceiling"
        elif last != base.plan.shapes[-1][0]:
            raise ConfigError(
                f"{arm.path}: ends with {last.n_parameters():,} parameters, {base.path} with "
                f"{base.plan.shapes[-1][0].n_parameters():,}, or in another shape: not comparable"
            )
        if arm.kind == "same FLOPs":
            one_step = arm.plan.flops / arm.config.max_steps
            same, what = abs(arm.plan.flops - base.plan.flops) < one_step, "FLOPs"
        else:
            same, what = tokens_of(arm) == tokens_of(base), "tokens"
        if not same:
            raise ConfigError(f"{arm.path}: not on as many {what} as {base.path}: not comparable")
    return arms


def tokens_of(arm: Arm) -> int:
    return arm.config.max_steps * arm.config.batch_size * arm.config.context_length


def shared_steps(a: Arm, b: Arm) -> int:
    """How many steps from the first on are the same in both, bit for bit."""
    differ = {key for key, value in vars(a.config).items() if value != vars(b.config)[key]}
    if differ - PRUNE_KNOBS or a.plan.shapes[0][0] != b.plan.shapes[0][0]:
        return 0
    one, two = a.plan.schedule, b.plan.schedule
    for step in range(1, min(a.config.max_steps, b.config.max_steps)):  # the last is one's own
        prunes = any(s.scoring(step) or s.phase(step) not in START for s in (one, two))
        if prunes or one.learning_rate(step) != two.learning_rate(step):
            return step - 1
    return step


START = ("train", "enlarged")  # the phases before the first prune


def find_trunks(arms: list[Arm]) -> list[tuple[Arm, list[tuple[Arm, int]]]]:
    """Who starts from a stretch of whom: (trunk, [(arm, steps), ...]), the trunk itself among them,
    for stretches of at least a twentieth of the run. The arm that shares most is the trunk.
    """
    trunks, left = [], list(arms)
    while left:
        shares = [[(a, shared_steps(t, a)) for a in left if a is not t] for t in left]
        shares = [[(a, n) for a, n in share if n * 20 >= a.config.max_steps] for share in shares]
        trunk, share = max(zip(left, shares), key=lambda pair: sum(n for _, n in pair[1]))
        if share:
            share.append((trunk, max(n for _, n in share)))
            trunks.append((trunk, share))
        taken = {a.name for a, _ in share} | {trunk.name}
        left = [a for a in left if a.name not in taken]
    return trunks


def print_plan(arms: list[Arm], n_seeds: int, speed: float) -> None:
    trunks = find_trunks(arms)
    saved = 0  # FLOPs of the stretches that need not be trained again
    for trunk, forks in trunks:
        of_stretch = trunk.plan.shapes[0][0].flops_per_token() * tokens_of(trunk)
        per_step = of_stretch / trunk.config.max_steps
        saved += per_step * (sum(n for _, n in forks) - max(n for _, n in forks))
    for arm in arms:
        first, last = (arm.plan.shapes[i][0].n_parameters() for i in (0, -1))
        size = compact(first) + (f" -> {compact(last)}" if last != first else "")
        print(
            f"{arm.name:<16}{size:>18} parameters {compact(tokens_of(arm)):>7} tokens "
            f"{arm.plan.flops:.3g} FLOPs"
        )
    total = (sum(arm.plan.flops for arm in arms) - saved) * n_seeds
    hours = total / speed / 3600
    shared = f"{saved * n_seeds:.2g} less for shared stretches"
    print(f"{n_seeds} seeds: {total:.3g} FLOPs ({shared}); {hours:.3g} hours at {speed:.3g} FLOP/s")
