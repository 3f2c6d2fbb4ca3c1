"""Compare configs over seeds: python -m tools.compare CONFIG ... --out studies/NAME

A config is an arm. FILE.py:TABLE is a table of arms, a dict in FILE.py of name -> {key: value}, the
changes of the config file that FILE.py assigns to `base`; FILE.py:TABLE:ARM is one of them. Every
arm and seed is a run of train.py, on one CPU thread unless OMP_NUM_THREADS says more. After a stop,
the same command goes on. Seeds that are done go to runs.csv; the first table names the `setting`.
Without a CONFIG, it prints the tables there. Any other --key=value is a knob for every arm."""

import csv
import io
import math
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from mpmath import betainc  # torch installs it

from data.command import UserError, command
from run.checkpoint import write_text
from run.config import NOT_SAVED, OF_ONE_RUN, Config, load_config, read_file
from run.cost import Plan
from run.log import read_log
from run.machine import SIGNALS
from run.out_dir import code_digest
from tools import expanded, load_plan, positive
from tools.plot import rises

OUR_OWN = NOT_SAVED | {"seed"}  # knobs that no arm has
# Of runs.csv, behind `setting`. prune_cost: the rise of the loss on the same batches, summed over
# the run's prunes
COLUMNS = {"arm": str, "seed": int, "val_loss": float, "val_bpb": float, "params": int}
COLUMNS |= {"tokens": int, "flops": int, "seconds": float, "prune_cost": float}

Arms = dict[str, dict[int, dict]]  # arm -> seed -> row


@dataclass
class Arm:
    setting: str  # its table, "" for a config file
    name: str
    path: str
    knobs: list[str]  # --key=value, for train.py
    config: Config
    plan: Plan


def seed_range(text: str) -> range:
    """5 stands for the seeds 1 to 5, 21-30 for 21 to 30."""
    first, _, last = text.rpartition("-")
    if not (seeds := range(int(first or 1), int(last) + 1)):
        raise ValueError(text)
    return seeds


def read_arms(argument: str) -> tuple[str, dict[str, tuple[str, list[str]]]]:
    """Of a CONFIG: its table, or ""; and arm -> (config file, knobs). Raises UserError."""
    path, colon, name = argument.partition(".py:")
    if not colon:
        return "", {Path(path).stem: (path, [])}
    values, (table, _, arm) = read_file(path + ".py"), name.partition(":")
    try:
        base, changes = values["base"], values[table]
        changes = {arm: changes[arm]} if arm else changes
        knobs = {n: [f"--{key}={value}" for key, value in changes[n].items()] for n in changes}
        if wrong := [n for n in knobs if not str(n).isidentifier()]:  # a folder gets this name
            raise ValueError(f"{wrong[0]!r} is not a name")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = "no such name, or no base = 'FILE.py' and TABLE = {ARM: {key: value}}"
        raise UserError(f"{argument}: {what}: {error}") from error
    return table, {n: (base, knobs[n]) for n in knobs}


def load_arms(arguments: list[str], overrides: list[str], reference: str) -> list[Arm]:
    """The arms, with `overrides`. Raises UserError with the name of one that cannot be compared."""
    arms: dict[str, Arm] = {}
    for argument in arguments:
        setting, found = read_arms(argument)
        for name, (path, changes) in found.items():
            knobs = [*changes, *overrides]
            try:
                if name in arms:
                    raise UserError("a second arm of this name; rename one")
                if own := [x for x in knobs if x.lstrip("-").partition("=")[0] in OUR_OWN]:
                    raise UserError(f"{own[0]}: not for a comparison; see --seeds, --runs, --out")
                arms[name] = Arm(setting, name, path, knobs, *load_plan(load_config(path, knobs)))
            except UserError as error:
                raise UserError(f"arm {name}: {error}") from error
    if reference not in arms:
        raise UserError(f"--reference={reference}: not among the arms {', '.join(arms)}")
    for arm in arms.values():
        check_comparable(arm, arms[reference])
    return list(arms.values())


def settled(arm: Arm) -> dict:
    """The knobs that all runs of an arm share."""
    return {k: v for k, v in vars(arm.config).items() if k not in OF_ONE_RUN}


def check_comparable(arm: Arm, reference: Arm) -> None:
    """Raises UserError unless both end in one shape on equal tokens or FLOPs, or it stays wide."""
    ours, theirs = arm.plan, reference.plan
    where = f"arm {arm.name}: not comparable with {reference.name}"
    ceiling = ours.final == ours.shape(1) == theirs.shape(1)
    if ours.final != theirs.final and not ceiling:
        raise UserError(f"{where}: ends as {ours.final}, not as {theirs.final}")
    for key, kind in (("data_dir", os.path.realpath), ("eval_tokens", int), ("dtype", str)):
        one, other = (kind(getattr(a.config, key)) for a in (arm, reference))
        if one != other and "auto" not in (one, other):
            raise UserError(f"{where}: {key}={one!r}, not {other!r}")
    steps, ratio = arm.config.max_steps, theirs.flops() / ours.flops()
    tokens, wanted = (p.schedule.max_steps * p.tokens_per_step for p in (ours, theirs))
    # A step and a half may differ: --shorter also rounds the steps between prunes
    if tokens != wanted and abs(ratio - 1) * steps >= 1.5:
        way = f"max_steps={round(steps * ratio)} would make the FLOPs equal"
        raise UserError(f"{where}: neither its tokens nor its FLOPs; {way}")


def start(arm: Arm, seed: int, out_dir: Path) -> subprocess.Popen:
    """Start train.py, or have it go on."""
    out_dir.mkdir(parents=True, exist_ok=True)
    knobs = [*arm.knobs, f"--seed={seed}", f"--out_dir={out_dir}", "--resume"]
    call = [sys.executable, Path(__file__).parent.parent / "train.py", arm.path, *knobs]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    with open(out_dir / "output.txt", "a") as file:
        return subprocess.Popen(call, stdout=file, stderr=file, env=environment)


def train_all(todo: list[tuple[Arm, int, Path]], jobs: int) -> bool:
    """Run each arm with its seed in its folder, `jobs` side by side. One that fails stops no other.
    At a signal to stop, every run saves. Returns whether none has failed."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)  # like Ctrl-C
    running: dict[subprocess.Popen, Path] = {}
    codes = []
    try:
        while todo or running:
            while todo and len(running) < jobs:
                run = todo.pop(0)
                running[start(*run)] = run[-1]
            time.sleep(0.1)
            for process in [p for p in running if p.poll() is not None]:
                codes.append(process.returncode)
                how = f"has ended, exit code {codes[-1]}"
                print(f"{running.pop(process)} {how}; {len(todo) + len(running)} to go", flush=True)
    finally:
        for process in running:
            if os.name == "posix":  # on Windows it would end unsaved; Ctrl-C is the runs' as well
                process.terminate()
        for process in running:
            process.wait()
    return not any(codes)


def collect(arms: list[Arm], folder: Path, code: str) -> Arms:
    """The rows of runs.csv, of seeds that are done. code: its digest when the comparison began.
    Raises UserError where runs do not compare."""
    found, same = {}, {}
    for arm in arms:
        for seed in sorted(int(p.name) for p in (folder / arm.name).glob("*") if p.name.isdigit()):
            log = read_log(out_dir := folder / arm.name / str(seed))
            if any(e.get("code") != code for e in log if e["event"] == "start"):
                raise UserError(f"{out_dir}: run by other code; take that, or another --out")
            if any(e.get("changed") for e in log):
                raise UserError(f"{out_dir}: resumed with --changed; remove it, or give --runs")
            if not log or log[-1]["event"] != "done":
                continue
            had, wanted = read_file(str(out_dir)), settled(arm).items()
            if old := [f"{k}={had[k]}" for k, v in wanted if v not in ("auto", had[k])]:
                raise UserError(f"{out_dir}: run with {', '.join(old)}; remove it, or give --runs")
            alike = {"dtype": had["dtype"], "data": log[0]["data"]}  # a digest, as are these
            alike |= {f"{key}={had[key]}": log[0][key] for key in ("teacher", "init_from")}
            for key, value in alike.items():
                if value != (other := same.setdefault(key, value)):
                    raise UserError(f"{out_dir}: {key}: {value}, elsewhere {other}")
            cost = sum(rises([e for e in log if e["event"] == "prune"]))
            row = log[-1] | {"arm": arm.name, "seed": seed, "prune_cost": cost}
            found.setdefault(arm.name, {})[seed] = {key: row[key] for key in COLUMNS}
    return found


def read_csv(path: Path) -> dict[str, Arms]:
    """Setting, or "" -> its arms. Raises UserError for what is no row."""
    settings: dict[str, Arms] = {}
    with open(path, newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        try:
            for line in lines:
                row = {key: kind(line[key]) for key, kind in COLUMNS.items()}
                arms = settings.setdefault(line["setting"], {})
                arms.setdefault(row["arm"], {})[row["seed"]] = row
        except (LookupError, TypeError, ValueError, csv.Error) as error:
            raise UserError(f"{path}: line {lines.line_num}: {error!r}") from error
    return settings


def check_kept(path: Path, known: Arms, done: Arms) -> None:
    """Raises UserError where runs.csv has a result that this call has not: it would be lost."""
    for arm, runs in known.items():
        for seed, row in runs.items():
            if row["val_loss"] != done.get(arm, {}).get(seed, {}).get("val_loss"):
                what = f"this call has not got its {arm}, seed {seed}, loss {row['val_loss']}"
                raise UserError(f"{path}: {what}; name that arm, give its --runs, or another --out")


def write(path: Path, settings: dict[str, Arms]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = csv.DictWriter(file := io.StringIO(), ["setting", *COLUMNS], lineterminator="\n")
    lines.writeheader()
    for name, arms in settings.items():
        lines.writerows({"setting": name} | row for runs in arms.values() for row in runs.values())
    write_text(path, file.getvalue())


def t_test(differences: list[float]) -> float:
    """Two-sided p of a paired t-test: how likely so large a mean is by chance; nan below 2."""
    if len(differences) < 2:
        return math.nan
    df, middle = len(differences) - 1, mean(differences)
    noise = df * stdev(differences) ** 2
    share = noise / (noise + (df + 1) * middle**2) if middle else 1  # df / (df + Student's t ** 2)
    return float(betainc(df / 2, 0.5, 0, share, regularized=True))


def paired(runs: dict[int, dict], base: dict[int, dict]) -> list[float]:
    """The differences in loss of two arms, on the seeds that both have."""
    return [runs[s]["val_loss"] - base[s]["val_loss"] for s in sorted(runs) if s in base]


def table(arms: Arms, reference: str) -> str:
    """A Markdown table of the arms: mean and standard deviation over seeds, and the difference to
    the reference on the seeds that both have, with its p-value; lowest difference first."""
    lines = {}  # each with the difference
    for arm, runs in arms.items():
        loss, bpb, *others = ([row[key] for row in runs.values()] for key in list(COLUMNS)[2:])
        params, tokens, flops, seconds, cost = map(mean, others)
        spread = f" ± {stdev(loss):.4f}" if len(loss) > 1 else ""
        pairs = paired(runs, arms.get(reference, {}))
        against = f"{mean(pairs):+.4f} ({t_test(pairs):.2g})" if pairs and arm != reference else ""
        line = f"| {arm} | {len(runs)} | {mean(loss):.4f}{spread} | {mean(bpb):.4f} | {against} "
        line += f"| {params:,.0f} | {tokens:,.0f} | {flops:.3g} | {seconds:.0f} | {cost:.3f} |"
        lines[line] = mean(pairs) if pairs else math.inf
    heads = f"| arm | seeds | loss, nats/token | bits/byte | minus {reference} (p) "
    text = [f"{heads}| parameters | tokens | FLOPs | seconds | prunes cost |", "| --- " * 10 + "|"]
    text += sorted(lines, key=lines.get)
    if len({tuple(sorted(runs)) for runs in arms.values()}) > 1:
        text += ["", "Arms have different seeds: compare the differences, not the losses."]
    return "\n".join(text) + "\n"


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)  # --key=value is a knob
    parser.add_argument("configs", nargs="*", metavar="CONFIG")
    parser.add_argument("--out", type=expanded, required=True, help="folder of the results")
    parser.add_argument("--runs", type=expanded, help="of the runs; default: out/, its name, table")
    parser.add_argument("--seeds", type=seed_range, default="3", help="5: 1 to 5; or 21-30")
    parser.add_argument("--jobs", type=positive, default=1, help="runs side by side")
    parser.add_argument("--reference", default="idea", help="the arm that others are compared to")
    args, knobs = parser.parse_known_args(argv)
    path = args.out / "runs.csv"
    if not args.configs:
        for name, of_setting in read_csv(path).items():
            print(f"{name}\n\n{table(of_setting, args.reference)}".lstrip())
        return 0
    arms = load_arms(args.configs, knobs, args.reference)
    setting = next((arm.setting for arm in arms if arm.setting), "")
    folder = args.runs or Path("out") / args.out.name / setting
    done = collect(arms, folder, code := code_digest())
    known = read_csv(path) if path.exists() else {}
    check_kept(path, known.get(setting, {}), done)
    every = [(arm, seed, folder / arm.name / str(seed)) for seed in args.seeds for arm in arms]
    todo = [run for run in every if run[1] not in done.get(run[0].name, {})]
    print(f"runs to do: {len(todo)} of {len(every)}, in {folder}/ARM/SEED/output.txt", flush=True)
    good = train_all(todo, args.jobs)
    if found := collect(arms, folder, code):
        write(path, known | {setting: found})
        print(table(found, args.reference), end="")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
