"""Compare configs over seeds: python -m tools.compare CONFIG ... --out studies/NAME

A config is an arm; a table of arms, as studies/lab/ablations.py, is many; FILE.py:NAME is one of
them. Every arm and seed is a run of train.py in --runs (out/NAME). What is done is not run again:
after a stop, the same command goes on. The results (tools/results.py), runs.csv and table.md, go to
--out. They are of every seed that is done: to give some arms more seeds, call it for these first,
then for all. Any other --key=value is a knob for every arm; --shorter=8 shows how it works in runs
that are eight times shorter, and proves nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from run import UserError
from run.config import NOT_SAVED, Config
from run.folder import read_log
from tools import command, positive
from tools.arms import Arm, load_arms
from tools.results import RUN_COLUMNS, read_csv, report, write

TRAIN = Path(__file__).parent.parent / "train.py"


def is_done(log: list[dict]) -> bool:
    return bool(log) and log[-1]["event"] == "done"


def check_same_arm(arm: Arm, folder: Path) -> None:
    """Raises UserError where an arm has runs that other knobs made: an arm edited since."""
    own = NOT_SAVED | {"seed", "device", "compile"}  # the machine's, or of one run
    for path in (folder / arm.name).glob("*/config.json"):
        then = vars(Config()) | json.loads(path.read_text())  # a newer knob had its default
        for key, value in vars(arm.config).items():
            if key not in own and value not in ("auto", then[key]):
                what = f"{key}={then[key]!r} there, {value!r} in {arm.name}"
                way = "remove it, or give another --runs"
                raise UserError(f"{path.parent}: made by another config ({what}); {way}")


def start(arm: Arm, seed: int, out_dir: Path, threads: int) -> subprocess.Popen:
    """Start train.py, or have it go on where it was stopped."""
    out_dir.mkdir(parents=True, exist_ok=True)
    output = out_dir / "output.txt"
    output.unlink(missing_ok=True)  # a process that is left from before keeps its own
    knobs = [*arm.knobs, f"--seed={seed}", f"--out_dir={out_dir}", "--resume"]
    # Unbuffered, its last line is its error
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with open(output, "w") as file:
        return subprocess.Popen(
            [sys.executable, str(TRAIN), arm.path, *knobs],
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches it once: train_all passes it on
        )


def train_all(arms: list[Arm], seeds: range, folder: Path, jobs: int, threads: int) -> bool:
    """Run every arm and seed that is not done, `jobs` side by side. One that fails stops no other.
    A signal to stop is passed on, and every run saves. Returns whether none has failed.
    """
    every = [(arm, seed, folder / arm.name / str(seed)) for seed in seeds for arm in arms]
    todo = [(arm, seed, out_dir) for arm, seed, out_dir in every if not is_done(read_log(out_dir))]
    print(f"runs to do: {len(todo)}; their output: {folder}/ARM/SEED/output.txt", flush=True)
    if done := len(every) - len(todo):
        print(f"done before: {done}; if code has changed since, --runs=F runs them again, in F")
    for number in (signal.SIGTERM, signal.SIGHUP):  # nohup ignores SIGHUP, and so it stays
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)  # like Ctrl-C
    running: dict[subprocess.Popen, Path] = {}
    good = True
    try:
        while todo or running:
            while todo and len(running) < jobs:
                arm, seed, out_dir = todo.pop(0)
                running[start(arm, seed, out_dir, threads)] = out_dir
            time.sleep(0.1)
            for process in [p for p in running if p.poll() is not None]:
                out_dir, code = running.pop(process), process.returncode
                print(f"{out_dir} has ended; {len(todo) + len(running)} to go", flush=True)
                if code:
                    good = False
                    words = (out_dir / "output.txt").read_text().strip().rpartition("\n")[2]
                    print(f"error: {out_dir}: exit code {code}: {words}", file=sys.stderr)
    finally:
        for process in running:
            process.terminate()  # it saves
        for process in running:
            process.wait()
    return good


def collect(arms: list[Arm], folder: Path) -> list[dict]:
    """The rows of runs.csv, of these arms and every seed that is done.

    Raises UserError where runs had different precisions or data, or were validated on other text.
    """
    rows, seen = [], {"precision": {}, "data": {}, "eval_tokens": {}}
    for arm in arms:
        paths = [p for p in (folder / arm.name).glob("*") if p.name.isdigit()]
        for out_dir in sorted(paths, key=lambda path: int(path.name)):
            if not is_done(log := read_log(out_dir)):
                continue
            config = json.loads((out_dir / "config.json").read_text())
            seen["precision"][config["dtype"]] = out_dir
            seen["data"][log[0].get("data", "")] = out_dir
            seen["eval_tokens"][str(config.get("eval_tokens"))] = out_dir
            rises = [e["loss_after"] - e["loss_before"] for e in log if e["event"] == "prune"]
            row = {"arm": arm.name, "seed": int(out_dir.name), "prune_cost": sum(rises)}
            rows.append(row | {key: log[-1][key] for key in RUN_COLUMNS[2:-1]})
    for what, values in seen.items():
        if len(values) > 1:
            which = "; ".join(f"{value[:8]} in {path}" for value, path in values.items())
            raise UserError(f"runs of different {what} do not compare: {which}")
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
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--jobs", type=positive, default=1, help="runs side by side")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads of a run")
    parser.add_argument("--reference", default="idea", help="the arm that others are compared to")
    args, knobs = parser.parse_known_args(argv)
    arms = load_arms(args.configs, knobs, args.reference)
    folder = args.runs or Path("out") / args.out.name
    for arm in arms:
        check_same_arm(arm, folder)
    try:
        good = train_all(arms, range(1, args.seeds + 1), folder, args.jobs, args.threads)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        raise
    rows = collect(arms, folder)
    if args.reference in {row["arm"] for row in rows}:  # what is done is written
        check_complete(args.out, rows)
        write(args.out, rows)
        report(args.out, args.reference)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
