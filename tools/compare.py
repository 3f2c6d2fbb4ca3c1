"""Compare configs over seeds: python -m tools.compare CONFIG ... --out results/NAME

Every config is an arm, every arm and seed a run of train.py in --runs (out/NAME). What is done is
not run again, and a stretch that arms share is trained once: arms that differ only from their first
prune on start from one enlarged checkpoint. The results go to --out: runs.csv, curves.csv, table.md
and the figure (tools/results.py). A --key=value that is not listed is a knob for every arm.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from checkpoint import CheckpointError, load_checkpoint, write_checkpoint, write_text
from config import Config, ConfigError, Plan, load_config, make_plan, match_flops
from data import DataError
from data.loader import TokenDataset
from data.prepare import prepare_shipped
from tools.results import CURVE_COLUMNS, RUN_COLUMNS, report, write

# Knobs with no say in a step before the first prune is near.
PRUNE_KNOBS = {"d_ff_target", "n_kv_head_target", "criterion", "score_beta", "scope", "layer_floor"}
PRUNE_KNOBS |= {"prune_schedule", "prune_start", "prune_end", "prune_every", "round_to"}
PRUNE_KNOBS |= {"lr_restart", "max_steps", "out_dir"}


@dataclass
class Arm:
    name: str
    path: str
    config: Config  # with max_steps as match_flops makes it
    plan: Plan
    kind: str  # "same tokens", "same FLOPs" or "ceiling", seen from the reference


# --------------------------------------------------------------------------------------------------
# Arms, and what they share
# --------------------------------------------------------------------------------------------------


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
        vocab_size = TokenDataset(c.data_dir, "train", c.context_length).vocab_size
        equal_flops = c.match_flops != ""
        c = match_flops(c, vocab_size)
        kind = "same FLOPs" if equal_flops else "same tokens"
        arms.append(Arm(Path(path).stem, path, c, make_plan(c, vocab_size), kind))
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
    for step in range(1, min(a.config.max_steps, b.config.max_steps) + 1):
        prunes = any(s.scoring(step) or s.phase(step) not in START for s in (one, two))
        if prunes or one.learning_rate(step) != two.learning_rate(step):
            return step - 1
    return step


START = ("train", "enlarged")  # the phases before the first prune


def find_trunks(arms: list[Arm]) -> list[tuple[Arm, list[tuple[Arm, int]]]]:
    """Who starts from a stretch of whom: (trunk, [(arm, steps), ...]), the trunk itself among them,
    for stretches of at least a tenth of the run. The arm that shares most is the trunk.
    """
    trunks, left = [], list(arms)
    while left:
        shares = [[(a, shared_steps(t, a)) for a in left if a is not t] for t in left]
        shares = [[(a, n) for a, n in share if n * 10 >= a.config.max_steps] for share in shares]
        trunk, share = max(zip(left, shares), key=lambda pair: sum(n for _, n in pair[1]))
        if share:
            share.append((trunk, max(n for _, n in share)))
            trunks.append((trunk, share))
        taken = {a.name for a, _ in share} | {trunk.name}
        left = [a for a in left if a.name not in taken]
    return trunks


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


@dataclass
class Runs:
    """Where and how the runs of a comparison are made."""

    folder: Path
    overrides: list[str]  # --key=value for train.py
    threads: int
    trunk_of: dict[str, Arm] = field(default_factory=dict)  # arm name -> where its run begins

    def out_dir(self, arm: Arm, seed: int) -> Path:
        return self.folder / arm.name / str(seed)

    def trunk_dir(self, arm: Arm, seed: int) -> Path:
        """Where the stretch that the arm starts from is trained, if it shares one."""
        trunk = self.trunk_of.get(arm.name, arm)
        return self.folder / "trunks" / trunk.name / str(seed)

    def train(self, arm: Arm, seed: int, out_dir: Path, *extra: str) -> None:
        """Run train.py, or go on with it. Raises RuntimeError with its last words if it fails."""
        if any(event["event"] == "done" for event in read_log(out_dir)):
            return
        out_dir.mkdir(parents=True, exist_ok=True)
        knobs = [*self.overrides, f"--seed={seed}", f"--out_dir={out_dir}", "--resume", *extra]
        train = Path(__file__).parent.parent / "train.py"
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        with open(out_dir / "output.txt", "a") as output:
            command = [sys.executable, str(train), arm.path, *knobs]
            code = subprocess.call(command, stdout=output, stderr=output, env=environment)
        if code:
            words = (out_dir / "output.txt").read_text().strip().rpartition("\n")[2]
            raise RuntimeError(f"{arm.name}, seed {seed}: exit code {code}: {words}")

    def stretch(self, trunk: Arm, arms: list[tuple[Arm, int]], seed: int) -> None:
        """Train a trunk; where an arm leaves it, stop and begin that arm's run from there."""
        here = self.trunk_dir(trunk, seed)
        for n in sorted({n for _, n in arms}):
            new = [a for a, m in arms if m == n and not read_log(self.out_dir(a, seed))]
            if new and max((e["step"] for e in read_log(here)), default=0) <= n:
                self.train(trunk, seed, here, f"--stop_after={n}")
                for arm in new:
                    fork(here, arm, seed, self.out_dir(arm, seed))

    def everything(self, arms: list[Arm], seeds: range, jobs: int) -> None:
        """Every arm and seed, `jobs` side by side: the shared stretches first, then the rest."""
        total = sum(arm.plan.flops for arm in arms) * len(seeds)
        with (
            ThreadPoolExecutor(jobs) as pool,
            tqdm(total=total, unit="FLOP", unit_scale=True) as bar,
        ):
            trunks = find_trunks(arms)
            self.trunk_of = {arm.name: trunk for trunk, forks in trunks for arm, _ in forks}
            shared = [pool.submit(self.stretch, *trunk, s) for s in seeds for trunk in trunks]
            self.watch(shared, arms, seeds, bar)
            runs = [(arm, s, self.out_dir(arm, s)) for s in seeds for arm in arms]
            self.watch([pool.submit(self.train, *run) for run in runs], arms, seeds, bar)

    def watch(self, futures: list, arms: list[Arm], seeds: range, bar: tqdm) -> None:
        """Show how far the runs are until all these have ended; then raise what one raised."""
        while wait(futures, timeout=2).not_done:
            logs = [
                read_log(self.out_dir(arm, seed)) or read_log(self.trunk_dir(arm, seed))
                for arm in arms
                for seed in seeds
            ]
            bar.update(sum(log[-1]["flops"] for log in logs if log) - bar.n)
        for future in futures:
            future.result()


def read_log(out_dir: Path) -> list[dict]:
    """The events of a run so far; its last line may be half written."""
    path = out_dir / "log.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def fork(trunk: Path, arm: Arm, seed: int, out_dir: Path) -> None:
    """Begin an arm's run with the weights, the moments and the log of its trunk's checkpoint. What
    `train.py --resume` makes of it is, bit for bit, the arm's own run from its first step.
    """
    state = load_checkpoint(trunk / "checkpoint.pt")
    saved = state["config"]
    config = dataclasses.replace(arm.config, seed=seed, dtype=saved["dtype"])
    state["config"] = json.dumps({key: getattr(config, key) for key in saved})
    state["model_config"] = json.dumps(dataclasses.asdict(state["model_config"]))
    out_dir.mkdir(parents=True, exist_ok=True)
    write_checkpoint(out_dir / "checkpoint.pt", state)
    log = [json.dumps(e) + "\n" for e in read_log(trunk) if e["step"] <= state["step"]]
    write_text(out_dir / "log.jsonl", "".join(log))


def collect(arms: list[Arm], seeds: range, runs: Runs) -> tuple[list[dict], list[dict]]:
    """The rows of runs.csv and curves.csv."""
    rows, curves = [], []
    for arm in arms:
        for seed in seeds:
            log = read_log(runs.out_dir(arm, seed))
            done = next(event for event in log if event["event"] == "done")
            rows.append({"arm": arm.name, "seed": seed} | {k: done[k] for k in RUN_COLUMNS[2:]})
            by_step = {e["step"]: e for e in log if e["event"] == "step"}
            for e in log:
                if e["event"] == "eval" and e["step"] in by_step:
                    e = by_step[e["step"]] | e
                    curves.append(
                        {"arm": arm.name, "seed": seed} | {k: e[k] for k in CURVE_COLUMNS[2:]}
                    )
    return rows, curves


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--runs", type=Path, help="folder of the runs; default: out/ and its name")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    parser.add_argument("--reference", default="idea", help="the arm that others are compared to")
    args, overrides = parser.parse_known_args(argv)
    try:
        arms = load_arms(args.configs, overrides, args.reference)
        runs = Runs(args.runs or Path("out") / args.out.name, overrides, args.threads)
        seeds = range(1, args.seeds + 1)
        runs.everything(arms, seeds, args.jobs)
        write(args.out, *collect(arms, seeds, runs))
        report(args.out, args.reference)
    except (ConfigError, DataError, CheckpointError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
