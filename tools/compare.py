"""Compare configs over seeds: python -m tools.compare CONFIG ... --out results/NAME

Every config is an arm, every arm and seed a run of train.py in --runs (out/NAME). What is done is
not run again, and a stretch that arms share is trained once: arms that differ only from their first
prune on start from one enlarged checkpoint. The results go to --out: runs.csv, curves.csv, table.md
and the figure (tools/results.py), of every seed that is done: some arms may get more than others by
a call of their own. A --key=value that is not listed is a knob for every arm.

--shorter N shows in a fraction of the time what the tool does, and proves nothing.
--plan SPEED says what the comparison costs at SPEED FLOP/s (of all jobs together) and runs nothing.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data import DataError
from run.checkpoint import (
    NOT_SAVED,
    CheckpointError,
    is_running,
    load_checkpoint,
    read_log,
    write_checkpoint,
    write_text,
)
from run.config import ConfigError
from tools.arms import Arm, find_trunks, load_arms, print_plan
from tools.results import CURVE_COLUMNS, RUN_COLUMNS, read_csv, report, write


@dataclass
class Runs:
    """Where and how the runs of a comparison are made."""

    folder: Path
    threads: int
    trunk_of: dict[str, Arm] = field(default_factory=dict)  # arm name -> where its run begins
    running: list[subprocess.Popen] = field(default_factory=list)
    failed: dict[tuple[str, int], RuntimeError] = field(default_factory=dict)  # by arm and seed

    def out_dir(self, arm: Arm, seed: int) -> Path:
        return self.folder / arm.name / str(seed)

    def trunk_dir(self, arm: Arm, seed: int) -> Path:
        """Where the stretch that the arm starts from is trained, if it shares one."""
        trunk = self.trunk_of.get(arm.name, arm)
        return self.folder / "trunks" / trunk.name / str(seed)

    def train(self, arm: Arm, seed: int, out_dir: Path, *extra: str) -> None:
        """Run train.py, or go on with it. Raises RuntimeError with its last words if it fails."""
        check_same_arm(arm, out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        knobs = [*arm.knobs, f"--seed={seed}", f"--out_dir={out_dir}", "--resume", *extra]
        train = Path(__file__).parent.parent / "train.py"
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        command = [sys.executable, str(train), arm.path, *knobs]
        while True:
            while is_running(out_dir):  # of a call that was killed: its run has not noticed
                time.sleep(0.1)
            if is_done(out_dir):
                return
            with (
                open(out_dir / "output.txt", "a") as output,
                subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process,
            ):
                self.running.append(process)
            self.running.remove(process)
            if process.returncode != 2 or not is_running(out_dir):  # that one was still starting
                break
        if process.returncode:
            words = (out_dir / "output.txt").read_text().strip().rpartition("\n")[2]
            code = process.returncode
            raise RuntimeError(f"{arm.name}, seed {seed}: exit code {code}: {words}")

    def stretch(self, trunk: Arm, arms: list[tuple[Arm, int]], seed: int) -> None:
        """Train a trunk; where an arm leaves it, stop and begin that arm's run from there."""
        here = self.trunk_dir(trunk, seed)
        for n in sorted({n for _, n in arms}):
            new = [a for a, m in arms if m == n and not read_log(self.out_dir(a, seed))]
            if new and max((e["step"] for e in read_log(here)), default=0) <= n:
                try:
                    self.train(trunk, seed, here, f"--stop_after={n}")
                    for arm in new:
                        fork(here, arm, seed, self.out_dir(arm, seed))
                except (RuntimeError, CheckpointError, OSError) as error:
                    unborn = [a for a, _ in arms if not read_log(self.out_dir(a, seed))]
                    self.failed |= {(arm.name, seed): error for arm in unborn}
                    return

    def whole(self, arm: Arm, seed: int) -> None:
        """Train an arm to its end, unless its shared stretch failed."""
        try:
            if (arm.name, seed) not in self.failed:
                self.train(arm, seed, self.out_dir(arm, seed))
        except RuntimeError as error:
            self.failed[arm.name, seed] = error

    def everything(self, arms: list[Arm], seeds: range, jobs: int) -> None:
        """Every arm and seed, `jobs` side by side: the shared stretches first, then the rest. What
        fails is in `failed`, and stops no other run.
        """
        total = sum(arm.plan.flops for arm in arms) * len(seeds)
        with (
            ThreadPoolExecutor(jobs) as pool,
            tqdm(total=total, unit="FLOP", unit_scale=True) as bar,
        ):
            trunks = find_trunks(arms)
            self.trunk_of = {arm.name: trunk for trunk, forks in trunks for arm, _ in forks}
            try:
                shared = [pool.submit(self.stretch, *trunk, s) for s in seeds for trunk in trunks]
                self.watch(shared, arms, seeds, bar)
                runs = [(arm, seed) for seed in seeds for arm in arms]
                self.watch([pool.submit(self.whole, *run) for run in runs], arms, seeds, bar)
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self.running:
                    process.terminate()  # it saves
                raise

    def watch(self, futures: list, arms: list[Arm], seeds: range, bar: tqdm) -> None:
        """Show how far the runs are until all these have ended."""
        while wait(futures, timeout=2).not_done:
            logs = [
                read_log(self.out_dir(arm, seed)) or read_log(self.trunk_dir(arm, seed))
                for arm in arms
                for seed in seeds
            ]
            bar.update(sum(log[-1]["flops"] for log in logs if log) - bar.n)
        for future in futures:
            future.result()


def is_done(out_dir: Path) -> bool:
    return any(event["event"] == "done" for event in read_log(out_dir))


def check_same_arm(arm: Arm, out_dir: Path) -> None:
    """Raises RuntimeError where a run is there that other knobs made: an arm edited since."""
    path = out_dir / "config.json"
    then = json.loads(path.read_text()) if path.exists() else {}
    own = NOT_SAVED | {"seed", "device", "compile"}  # the machine's, or of one run
    if arm.config.dtype == "auto":
        own |= {"dtype"}
    for key, value in vars(arm.config).items():
        if key not in own and then.get(key, value) != value:
            what = f"{key}={then[key]!r} there, {value!r} in {arm.path}"
            raise RuntimeError(f"{out_dir}: made by another config ({what}); remove it, or --runs")


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


def collect(arms: list[Arm], runs: Runs) -> tuple[list[dict], list[dict]]:
    """The rows of runs.csv and curves.csv, of these arms and every seed that is done. Between the
    validations, curves.csv has what the first seed's log tells of each arm's width and rate.

    Raises RuntimeError where runs had different precisions.
    """
    rows, curves, dtypes = [], [], {}
    for arm in arms:
        folders = [p for p in (runs.folder / arm.name).glob("*") if p.name.isdigit()]
        seeds = sorted(int(p.name) for p in folders if is_done(p))
        seeds = [seed for seed in seeds if (arm.name, seed) not in runs.failed]
        for seed in seeds:
            out_dir = runs.out_dir(arm, seed)
            check_same_arm(arm, out_dir)
            dtypes[json.loads((out_dir / "config.json").read_text())["dtype"]] = out_dir
            if len(dtypes) > 1:
                which = "; ".join(f"{dtype} in {folder}" for dtype, folder in dtypes.items())
                raise RuntimeError(f"runs of different precision do not compare: {which}")
            log = read_log(runs.out_dir(arm, seed))
            done = next(event for event in log if event["event"] == "done")
            prunes = [e for e in log if e["event"] == "prune"]
            done |= {"prune_cost": sum(e["loss_after"] - e["loss_before"] for e in prunes)}
            rows.append({"arm": arm.name, "seed": seed} | {k: done[k] for k in RUN_COLUMNS[2:]})
            by_step = {e["step"]: e for e in log if e["event"] == "step"}
            for e in log:
                judged = e["event"] == "eval" and e["step"] in by_step
                if judged or (e["event"] == "step" and seed == seeds[0]):
                    e = by_step[e["step"]] | {"val_loss": ""} | e
                    curves.append(
                        {"arm": arm.name, "seed": seed} | {k: e[k] for k in CURVE_COLUMNS[2:]}
                    )
    return rows, curves


def with_others(out: Path, rows: list[dict], curves: list[dict], reference: str) -> tuple:
    """And the rows in `out` of arms and seeds that this call leaves out: one comparison can be made
    by several calls. Raises RuntimeError where the runs there are others: the reference's losses
    or an arm's size or cost differ, or no seed of the reference is in both.
    """
    if not (out / "runs.csv").exists():
        return rows, curves

    def losses(table: list[dict]) -> dict[int, float]:
        return {r["seed"]: r["val_loss"] for r in table if r["arm"] == reference}

    def costs(table: list[dict]) -> dict[str, tuple]:
        return {r["arm"]: (r["params"], r["tokens"], r["flops"]) for r in table}

    old = read_csv(out / "runs.csv")
    there, here = losses(old), losses(rows)
    changed = [f"{reference}, seed {s}" for s in there if there[s] != here.get(s, there[s])]
    changed += [arm for arm, cost in costs(old).items() if cost != costs(rows).get(arm, cost)]
    if changed or not {*there} & {*here}:
        which = f" of {'; '.join(changed)}" if changed else ""
        raise RuntimeError(
            f"{out}: holds other runs{which}; give another --out, and --runs as it was"
        )
    made = {(row["arm"], row["seed"]) for row in rows}
    kept = [
        [row for row in read_csv(out / f"{name}.csv") if (row["arm"], row["seed"]) not in made]
        for name in ("runs", "curves")
    ]
    return rows + kept[0], curves + kept[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--runs", type=Path, help="folder of the runs; default: out/ and its name")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    parser.add_argument("--reference", default="idea", help="the arm that others are compared to")
    parser.add_argument("--shorter", type=int, default=1, metavar="N", help="runs N times shorter")
    parser.add_argument("--plan", type=float, metavar="SPEED", help="only say what it costs")
    args, overrides = parser.parse_known_args(argv)
    if args.shorter != 1:
        overrides.append(f"--shorter={args.shorter}")
    try:
        arms = load_arms(args.configs, overrides, args.reference)
        if args.plan:
            print_plan(arms, args.seeds, args.plan)
            return 0
        runs = Runs(args.runs or Path("out") / args.out.name, args.threads)
        runs.everything(arms, range(1, args.seeds + 1), args.jobs)
        rows, curves = collect(arms, runs)
        if args.reference in {row["arm"] for row in rows}:
            write(args.out, *with_others(args.out, rows, curves, args.reference))
            report(args.out, args.reference)
        if args.shorter != 1:
            print(f"runs {args.shorter} times shorter than their configs: this proves nothing")
        for error in dict.fromkeys(map(str, runs.failed.values())):  # what is done is written
            print(f"error: {error}", file=sys.stderr)
        if runs.failed:
            return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    except (ConfigError, DataError, CheckpointError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
