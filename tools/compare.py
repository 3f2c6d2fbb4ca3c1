"""Compare configs over seeds: python -m tools.compare CONFIG ... --out studies/NAME

A config is an arm. A table of arms, FILE.py, assigns `base`, a config file, and `arms`, name ->
{key: value}; FILE.py:NAME is one of them. Every arm and seed is a run of train.py in --runs, on one
CPU thread unless OMP_NUM_THREADS says more. What is done is not run again: after a stop, the same
command goes on. --out gets runs.csv and table.md, of every seed that is done: to give some arms
more seeds, call it for these first, then for all. Any other --key=value is a knob for every arm."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from run import UserError
from run.config import NOT_SAVED, Config, load_config, read_file
from run.cost import Plan
from run.machine import SIGNALS
from run.out_dir import read_log
from tools import ArgumentParser, expanded, positive, program, seed_range
from tools.figures import rises
from tools.load import load_plan
from tools.results import Arms, as_row, read_results, report, write

TRAIN = Path(__file__).parent.parent / "train.py"
OUR_OWN = NOT_SAVED | {"seed"}  # knobs that no arm has
OF_ONE_RUN = OUR_OWN | {"device", "compile"}  # other knobs are the same in all runs of an arm
NAME = re.compile(r"\w[\w .+-]*")  # of an arm: a folder has it, and a row of a table


@dataclass
class Arm:
    name: str
    path: str
    knobs: list[str]  # --key=value, for train.py
    config: Config
    plan: Plan


def read_arms(argument: str) -> dict[str, tuple[str, list[str]]]:
    """Name -> (config file, knobs), of the CONFIG of a command line. Raises UserError."""
    path, colon, name = argument.partition(".py:")
    table = read_file(path + ".py" if colon else path)
    if not colon and "arms" not in table:
        return {Path(path).stem: (path, [])}
    try:
        base, arms = table["base"], table["arms"]
        names = [name] if colon else [*arms]
        if wrong := [n for n in names if not (isinstance(n, str) and NAME.fullmatch(n))]:
            raise ValueError(f"{wrong[0]!r} cannot name a folder")
        return {n: (base, [f"--{key}={value}" for key, value in arms[n].items()]) for n in names}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = "no such name, or no table of base = 'FILE.py' and arms = {NAME: {key: value}}"
        raise UserError(f"{argument}: {what}: {error}") from error


def load_arms(arguments: list[str], overrides: list[str], reference: str) -> list[Arm]:
    """The arms, with `overrides` on top. Raises UserError with the name of one that cannot run, or
    does not compare with the reference."""
    arms: dict[str, Arm] = {}
    for argument in arguments:
        for name, (path, changes) in read_arms(argument).items():
            if name in arms:
                raise UserError(f"{argument}: a second arm of the name {name}; rename one")
            try:
                knobs = [*changes, *overrides]
                for knob in knobs:
                    if knob.removeprefix("--").partition("=")[0] in OUR_OWN:
                        what = "not for a comparison, which has --seeds, --runs and --out"
                        raise UserError(f"{knob}: {what}")
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
    ceiling = ours.final == ours.shape(1) == theirs.shape(1)
    if ours.final != theirs.final and not ceiling:
        raise UserError(f"{where}: ends as {ours.final}, not as {theirs.final}")
    steps, ratio = arm.config.max_steps, theirs.flops() / ours.flops()
    tokens, wanted = (p.schedule.max_steps * p.tokens_per_step for p in (ours, theirs))
    # A step and a half may differ: --shorter also rounds the steps between prunes
    if tokens != wanted and abs(ratio - 1) * steps >= 1.5:
        way = f"max_steps={round(steps * ratio)} would make the FLOPs equal"
        raise UserError(f"{where}: neither its tokens nor its FLOPs; {way}")


def is_done(log: list[dict]) -> bool:
    return bool(log) and log[-1]["event"] == "done"


def start(arm: Arm, seed: int, out_dir: Path) -> subprocess.Popen:
    """Start train.py, or have it go on."""
    out_dir.mkdir(parents=True, exist_ok=True)
    knobs = [*arm.knobs, f"--seed={seed}", f"--out_dir={out_dir}", "--resume"]
    call = [sys.executable, "-u", TRAIN, arm.path, *knobs]  # -u: its last line is its error
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    with open(out_dir / "output.txt", "a") as file:
        return subprocess.Popen(call, stdout=file, stderr=file, env=environment)


def train_all(arms: list[Arm], seeds: range, folder: Path, jobs: int) -> bool:
    """Run every arm and seed that is not done, `jobs` side by side. One that fails stops no other.
    At a signal to stop, every run saves. Returns whether none has failed."""
    every = [(arm, seed, folder / arm.name / str(seed)) for seed in seeds for arm in arms]
    todo = [run for run in every if not is_done(read_log(run[-1]))]
    print(f"runs to do: {len(todo)} of {len(every)}, in {folder}/ARM/SEED/output.txt", flush=True)
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)  # like Ctrl-C
    running: dict[subprocess.Popen, Path] = {}
    good = True
    try:
        while todo or running:
            while todo and len(running) < jobs:
                run = todo.pop(0)
                running[start(*run)] = run[-1]
            time.sleep(0.1)
            for process in [p for p in running if p.poll() is not None]:
                out_dir, code = running.pop(process), process.returncode
                print(f"{out_dir} has ended; {len(todo) + len(running)} to go", flush=True)
                if code:
                    good, output = False, (out_dir / "output.txt").read_text(errors="replace")
                    words = output.strip().rpartition("\n")[2]
                    print(f"error: {out_dir}: exit code {code}: {words}", file=sys.stderr)
    finally:
        if running:
            print("stopping; the same command goes on", file=sys.stderr)
        for process in running:
            if os.name == "posix":  # on Windows it would end unsaved; Ctrl-C is the runs' as well
                process.terminate()
        for process in running:
            process.wait()
    return good


def collect(arms: list[Arm], folder: Path) -> Arms:
    """The rows of runs.csv, of every seed that is done. Raises UserError where an arm has been
    edited since, or runs had different precisions, data or text to validate on."""
    found, same = {}, ()
    for arm in arms:
        for seed in sorted(int(p.name) for p in (folder / arm.name).glob("*") if p.name.isdigit()):
            out_dir = folder / arm.name / str(seed)
            if not is_done(log := read_log(out_dir)):
                continue
            had = vars(Config()) | read_file(str(out_dir))  # a newer knob had its default
            wanted = {k: v for k, v in vars(arm.config).items() if k not in OF_ONE_RUN}
            if old := [f"{k}={had[k]}" for k, v in wanted.items() if v not in ("auto", had[k])]:
                what = f"made by another config, with {', '.join(old)}"
                raise UserError(f"{out_dir}: {what}; remove it, or give another --runs")
            here = had["dtype"], had["eval_tokens"], log[0].get("data")  # a digest
            if here != (same := same or here):
                what = f"does not compare: dtype, eval_tokens and data are {here}, elsewhere {same}"
                raise UserError(f"{out_dir}: {what}")
            try:
                cost = sum(rises([e for e in log if e["event"] == "prune"]))
                row = log[-1] | {"arm": arm.name, "seed": seed, "prune_cost": cost}
                found.setdefault(arm.name, {})[seed] = as_row(row)
            except (LookupError, TypeError, ValueError) as error:
                raise UserError(f"{out_dir}: its log says no result: {error}") from error
    return found


@program
def main(parser: ArgumentParser, argv: list[str]) -> int:
    parser.allow_abbrev = False  # what is no option is a knob
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--out", type=expanded, required=True, help="folder of the results")
    parser.add_argument("--runs", type=expanded, help="of the runs; default: out/ and its name")
    parser.add_argument("--seeds", type=seed_range, default="3", help="5: 1 to 5; or 21-30")
    parser.add_argument("--jobs", type=positive, default=1, help="runs side by side")
    parser.add_argument("--reference", default="idea", help="the arm that others are compared to")
    args, knobs = parser.parse_known_args(argv)
    read_results(args.out)  # before hours of runs: what is no result stays there
    arms = load_arms(args.configs, knobs, args.reference)
    folder = args.runs or Path("out") / args.out.name
    collect(arms, folder)  # what is done must be of these arms
    good = train_all(arms, args.seeds, folder, args.jobs)
    found = collect(arms, folder)
    if args.reference in found:  # what is done is written
        write(args.out, found)
        report(args.out, args.reference)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
