"""Compare configs over seeds: python -m tools.compare CONFIG ... --out results/NAME

A config is an arm; a table of arms, such as configs/ablations.py, is many; FILE.py:NAME is one of
them. Every arm and seed is a run of train.py in --runs (out/NAME). What is done is not run again:
after a stop, the same command goes on. The results (tools/results.py), runs.csv, table.md and a
figure, go to --out. They are of every seed that is done: to give some arms more seeds, call it for
these first, then for all. Any other --key=value is a knob for every arm; --shorter=8 shows how it
works in runs that are eight times shorter, and proves nothing.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from run import UserError
from run.config import NOT_SAVED
from run.folder import read_log
from tools import command
from tools.arms import Arm, load_arms
from tools.results import RUN_COLUMNS, read_csv, report, write

TRAIN = Path(__file__).parent.parent / "train.py"


@dataclass
class Runs:
    """Where and how the runs of a comparison are made."""

    folder: Path
    threads: int
    running: list[subprocess.Popen] = field(default_factory=list)
    failed: dict[tuple[str, int], UserError] = field(default_factory=dict)  # by arm and seed

    def out_dir(self, arm: Arm, seed: int) -> Path:
        return self.folder / arm.name / str(seed)

    def everything(self, arms: list[Arm], seeds: range, jobs: int) -> None:
        """Every arm and seed, `jobs` side by side. What fails is in `failed`, and stops no other
        run."""
        runs = [(arm, seed) for seed in seeds for arm in arms]
        total = sum(arm.plan.flops() for arm, _ in runs)
        bar = tqdm(total=total, unit="FLOP", unit_scale=True)
        with bar, ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(self.train, *run) for run in runs]
            try:
                while wait(futures, timeout=2).not_done:
                    logs = [read_log(self.out_dir(*run)) for run in runs]
                    bar.update(sum(log[-1]["flops"] for log in logs if log) - bar.n)
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self.running:
                    process.terminate()  # it saves; one that has ended takes no signal
                raise
        for future in futures:
            future.result()  # raises what was not foreseen

    def train(self, arm: Arm, seed: int) -> None:
        """Run train.py, or go on with it, or leave what is done."""
        out_dir = self.out_dir(arm, seed)
        knobs = [*arm.knobs, f"--seed={seed}", f"--out_dir={out_dir}", "--resume"]
        command = [sys.executable, str(TRAIN), arm.path, *knobs]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        try:
            check_same_arm(arm, out_dir)
            if is_done(out_dir):
                return
            out_dir.mkdir(parents=True, exist_ok=True)
            with open(out_dir / "output.txt", "a") as file:
                process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
                self.running.append(process)
                code = process.wait()
            if code:
                words = (out_dir / "output.txt").read_text().strip().rpartition("\n")[2]
                raise UserError(f"{arm.name}, seed {seed}: exit code {code}: {words}")
        except (UserError, OSError) as error:
            self.failed[arm.name, seed] = error


def is_done(out_dir: Path) -> bool:
    return any(event["event"] == "done" for event in read_log(out_dir))


def check_same_arm(arm: Arm, out_dir: Path) -> None:
    """Raises UserError where a run is there that other knobs made: an arm edited since."""
    path = out_dir / "config.json"
    then = json.loads(path.read_text()) if path.exists() else {}
    own = NOT_SAVED | {"seed", "device", "compile"}  # the machine's, or of one run
    if arm.config.dtype == "auto":
        own |= {"dtype"}
    for key, value in vars(arm.config).items():
        if key not in own and then.get(key, value) != value:
            what = f"{key}={then[key]!r} there, {value!r} in {arm.name}"
            raise UserError(f"{out_dir}: made by another config ({what}); remove it, or --runs")


def collect(arms: list[Arm], runs: Runs) -> list[dict]:
    """The rows of runs.csv, of these arms and every seed that is done.

    Raises UserError where runs had different precisions.
    """
    rows, dtypes = [], {}
    for arm in arms:
        folders = [p for p in (runs.folder / arm.name).glob("*") if p.name.isdigit()]
        seeds = sorted(int(p.name) for p in folders if is_done(p))
        seeds = [seed for seed in seeds if (arm.name, seed) not in runs.failed]
        for seed in seeds:
            out_dir, who = runs.out_dir(arm, seed), {"arm": arm.name, "seed": seed}
            check_same_arm(arm, out_dir)
            dtypes[json.loads((out_dir / "config.json").read_text())["dtype"]] = out_dir
            log = read_log(out_dir)
            done = next(e for e in log if e["event"] == "done")
            rises = [e["loss_after"] - e["loss_before"] for e in log if e["event"] == "prune"]
            rows.append(who | {k: done[k] for k in RUN_COLUMNS[2:-1]} | {"prune_cost": sum(rises)})
    if len(dtypes) > 1:
        which = "; ".join(f"{dtype} in {folder}" for dtype, folder in dtypes.items())
        raise UserError(f"runs of different precision do not compare: {which}")
    return rows


def check_complete(out: Path, rows: list[dict]) -> None:
    """Raises UserError where `out` holds a run that is not among these: it would be lost."""
    keys, path = ("arm", "seed", "val_loss"), out / "runs.csv"
    kept = [[row[key] for key in keys] for row in rows]
    for row in read_csv(path) if path.exists() else ():
        if [row[key] for key in keys] not in kept:
            what = f"holds a run of {row['arm']}, seed {row['seed']}, that is not among these"
            raise UserError(f"{out}: {what}; name its arm as well, or give another --out")


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--runs", type=Path, help="folder of the runs; default: out/ and its name")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    parser.add_argument("--reference", default="idea", help="the arm that others are compared to")
    args, knobs = parser.parse_known_args(argv)
    try:
        arms = load_arms(args.configs, knobs, args.reference)
        runs = Runs(args.runs or Path("out") / args.out.name, args.threads)
        runs.everything(arms, range(1, args.seeds + 1), args.jobs)
        for error in runs.failed.values():
            print(f"error: {error}", file=sys.stderr)
        rows = collect(arms, runs)
        if args.reference in {row["arm"] for row in rows}:  # what is done is written
            check_complete(args.out, rows)
            write(args.out, rows)
            report(args.out, args.reference)
        return 1 if runs.failed else 0
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
