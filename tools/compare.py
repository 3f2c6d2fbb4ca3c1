"""Compare configs over seeds: python -m tools.compare CONFIG ... --out=studies/NAME

A config is an arm. FILE.py:TABLE is a table of arms: a dict in FILE.py of name ->
{key: value}, the changes of the config file that FILE.py assigns to `base`.
FILE.py:TABLE:ARM is one arm of it. Any other --key=value is a knob of every arm.

Every arm and seed is a run of train.py, on one CPU thread unless OMP_NUM_THREADS says
otherwise. After a stop, the same command continues. Results of finished runs go to
runs.csv, where the first table is the `setting`. Without a CONFIG, this prints the
tables of runs.csv.
"""

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

from configs import ONE_CALL, Config, load_config, read_file
from data.command import UserError, command, write_whole
from tools import expanded, positive, read_log
from tools.plan import Plan, load_plan

TRAIN = Path(__file__).parent.parent / "train.py"
OUR_OWN = {*ONE_CALL, "seed"}  # knobs that no arm has
MAY_DIFFER = {*OUR_OWN, "device", "compile"}  # between the runs of an arm
# Of runs.csv, after `setting`
COLUMNS = {
    "arm": str,
    "seed": int,
    "val_loss": float,
    "val_bpb": float,
    "params": int,
    "tokens": int,
    "flops": int,
    "seconds": float,
    "prune_cost": float,  # what all prunes added to the loss on the same batches
}

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
    """The seeds 1 to 5 for "5", and 21 to 30 for "21-30"."""
    first, _, last = text.rpartition("-")
    seeds = range(int(first or 1), int(last) + 1)
    if not seeds:
        raise ValueError(text)
    return seeds


# --------------------------------------------------------------------------------------
# Arms


def read_arms(argument: str) -> tuple[str, dict[str, tuple[str, list[str]]]]:
    """The table of a CONFIG, or "", and its arms: name -> (config file, knobs).

    Raises UserError.
    """
    path, colon, name = argument.partition(".py:")
    if not colon:
        return "", {Path(path).stem: (path, [])}
    values = read_file(path + ".py")
    table, _, only = name.partition(":")
    arms = {}
    try:
        base = values["base"]
        for arm in [only] if only else values[table]:
            changes = values[table][arm]
            if not str(arm).isidentifier():  # a folder gets this name
                raise ValueError(f"{arm!r} is not a name")
            arms[arm] = (base, [f"--{key}={value}" for key, value in changes.items()])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = "no such name, or no base = 'FILE.py' and TABLE = {ARM: {key: value}}"
        raise UserError(f"{argument}: {reason}: {error}") from error
    return table, arms


def load_arms(arguments: list[str], knobs: list[str], reference: str) -> list[Arm]:
    """The arms that these CONFIGs name, with these knobs.

    Raises UserError, with the name of an arm that cannot be compared.
    """
    arms: dict[str, Arm] = {}
    for argument in arguments:
        setting, found = read_arms(argument)
        for name, (path, changes) in found.items():
            if name in arms:
                raise UserError(f"arm {name}: a second arm of this name; rename one")
            try:
                arms[name] = load_arm(setting, name, path, [*changes, *knobs])
            except UserError as error:
                raise UserError(f"arm {name}: {error}") from error
    if reference not in arms:
        names = ", ".join(arms)
        raise UserError(f"--reference={reference}: not among the arms {names}")
    for arm in arms.values():
        check_comparable(arm, arms[reference])
    return list(arms.values())


def load_arm(setting: str, name: str, path: str, knobs: list[str]) -> Arm:
    """An arm, with the config and the plan of its runs. Raises UserError."""
    for knob in knobs:
        key = knob.lstrip("-").partition("=")[0]
        if key in OUR_OWN:
            advice = "see --seeds, --runs, --out"
            raise UserError(f"{knob}: not for a comparison; {advice}")
    config, _ = load_config(path, knobs)
    config, plan = load_plan(config)
    return Arm(setting, name, path, knobs, config, plan)


def check_comparable(arm: Arm, reference: Arm) -> None:
    """Raises UserError unless an arm ends in the reference's shape, on as many tokens
    or FLOPs. An arm that keeps the reference's enlarged shape is fine, too."""
    ours = arm.plan
    theirs = reference.plan
    problem = f"arm {arm.name}: not comparable with {reference.name}"
    stays_enlarged = ours.final == ours.enlarged == theirs.enlarged
    if ours.final != theirs.final and not stays_enlarged:
        raise UserError(f"{problem}: ends as {ours.final}, not as {theirs.final}")
    check_knob("data_dir", arm, reference, problem)
    check_knob("eval_tokens", arm, reference, problem)
    check_knob("dtype", arm, reference, problem)

    our_tokens = arm.config.max_steps * ours.tokens_per_step
    their_tokens = reference.config.max_steps * theirs.tokens_per_step
    if our_tokens == their_tokens:
        return
    steps = arm.config.max_steps
    steps_for_equal_flops = steps * theirs.flops() / ours.flops()
    # A step and a half may differ, because --shorter also rounds the steps of prunes
    if abs(steps_for_equal_flops - steps) >= 1.5:
        advice = f"max_steps={round(steps_for_equal_flops)} would make the FLOPs equal"
        raise UserError(f"{problem}: neither its tokens nor its FLOPs; {advice}")


def check_knob(key: str, arm: Arm, reference: Arm, problem: str) -> None:
    """Raises UserError if a knob differs from the reference's, and none is auto."""
    ours = getattr(arm.config, key)
    theirs = getattr(reference.config, key)
    if key == "data_dir":
        ours = os.path.realpath(ours)
        theirs = os.path.realpath(theirs)
    if ours != theirs and "auto" not in (ours, theirs):
        raise UserError(f"{problem}: {key}={ours!r}, not {theirs!r}")


# --------------------------------------------------------------------------------------
# Runs


def start(arm: Arm, seed: int, out_dir: Path) -> subprocess.Popen:
    """Start train.py, or let it continue."""
    out_dir.mkdir(parents=True, exist_ok=True)
    ours = [f"--seed={seed}", f"--out_dir={out_dir}", "--resume"]
    call = [sys.executable, TRAIN, arm.path, *arm.knobs, *ours]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    with open(out_dir / "output.txt", "a") as file:
        return subprocess.Popen(call, stdout=file, stderr=file, env=environment)


def train_all(todo: list[tuple[Arm, int, Path]], jobs: int) -> bool:
    """Run each (arm, seed, folder), `jobs` side by side. Returns whether none failed.

    A run that fails stops no other. At a signal to stop, every run saves.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    todo = list(todo)
    running: dict[subprocess.Popen, Path] = {}
    all_good = True
    try:
        while todo or running:
            while todo and len(running) < jobs:
                arm, seed, out_dir = todo.pop(0)
                running[start(arm, seed, out_dir)] = out_dir
            time.sleep(0.1)
            for process, out_dir in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[process]
                all_good = all_good and code == 0
                left = len(todo) + len(running)
                end = f"has ended, exit code {code}; {left} to go"
                print(f"{out_dir} {end}", flush=True)
    finally:
        for process in running:
            # On Windows, terminate would be a kill; there, Ctrl-C reaches the runs, too
            if os.name == "posix":
                process.terminate()
        for process in running:
            process.wait()
    return all_good


def collect(arms: list[Arm], folder: Path) -> Arms:
    """The rows of all seeds that are done. Raises UserError if runs do not compare."""
    found: Arms = {}
    common: dict[str, str] = {}  # what all runs must share
    for arm in arms:
        numbers = []
        for path in (folder / arm.name).glob("*"):
            if path.name.isdigit():
                numbers.append(int(path.name))
        for seed in sorted(numbers):
            row = read_row(arm, seed, folder / arm.name / str(seed), common)
            if row:
                found.setdefault(arm.name, {})[seed] = row
    return found


def read_row(arm: Arm, seed: int, out_dir: Path, common: dict) -> dict | None:
    """The row of a run, or None if it is not done.

    Raises UserError if the run has other knobs than its arm, or other data than those
    in `common`, which this fills.
    """
    log = read_log(out_dir)
    advice = "remove it, or give --runs"
    for event in log:
        if event["event"] == "start" and event["changes"]:
            changes = ", ".join(event["changes"])
            raise UserError(f"{out_dir}: changed on resume ({changes}); {advice}")
    if not log or log[-1]["event"] != "done":
        return None
    knobs = read_file(str(out_dir))
    others = []
    for key, value in vars(arm.config).items():
        same = value in ("auto", knobs.get(key))
        if key not in MAY_DIFFER and not same:
            others.append(f"{key}={knobs.get(key)}")
    if others:
        raise UserError(f"{out_dir}: run with {', '.join(others)}; {advice}")
    shared = {
        "dtype": knobs["dtype"],
        "data": log[0]["data"],
        "tokenizer": log[0]["tokenizer"],
    }
    for key, value in shared.items():
        elsewhere = common.setdefault(key, value)
        if value != elsewhere:
            raise UserError(f"{out_dir}: {key}: {value}, elsewhere {elsewhere}")
    prune_cost = 0.0
    for event in log:
        if event["event"] == "prune":
            prune_cost += event["loss_after"] - event["loss_before"]
    row = log[-1] | {"arm": arm.name, "seed": seed, "prune_cost": prune_cost}
    return {key: row[key] for key in COLUMNS}


# --------------------------------------------------------------------------------------
# runs.csv


def read_csv(path: Path) -> dict[str, Arms]:
    """Setting, or "" -> its arms. Raises UserError if a line is not a row."""
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
    """Raises UserError if runs.csv has a result that this call would lose."""
    for arm, runs in known.items():
        for seed, row in runs.items():
            mine = done.get(arm, {}).get(seed, {})
            if mine.get("val_loss") != row["val_loss"]:
                result = f"{arm}, seed {seed}, loss {row['val_loss']}"
                advice = "name that arm, give its --runs, or another --out"
                raise UserError(f"{path}: this call lacks its {result}; {advice}")


def write(path: Path, settings: dict[str, Arms]) -> None:
    """Write what read_csv reads."""
    file = io.StringIO()
    lines = csv.DictWriter(file, ["setting", *COLUMNS], lineterminator="\n")
    lines.writeheader()
    for setting, arms in settings.items():
        for runs in arms.values():
            for row in runs.values():
                lines.writerow({"setting": setting} | row)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = file.getvalue().encode()
    write_whole(path, lambda target: target.write(content))


# --------------------------------------------------------------------------------------
# The table


def t_test(differences: list[float]) -> float:
    """The two-sided p of a paired t-test; nan if there are fewer than 2 pairs.

    It says how likely chance alone makes so large a mean.
    """
    if len(differences) < 2:
        return math.nan
    middle = mean(differences)
    if middle == 0:
        return 1.0
    df = len(differences) - 1
    noise = df * stdev(differences) ** 2
    share = noise / (noise + (df + 1) * middle**2)  # df / (df + Student's t ** 2)
    return float(betainc(df / 2, 0.5, 0, share, regularized=True))


def paired(runs: dict[int, dict], base: dict[int, dict]) -> list[float]:
    """The differences in loss of two arms, on the seeds that both have."""
    differences = []
    for seed in sorted(runs):
        if seed in base:
            differences.append(runs[seed]["val_loss"] - base[seed]["val_loss"])
    return differences


def table(arms: Arms, reference: str) -> str:
    """A table in Markdown: the mean and the standard deviation of each arm over its
    seeds, and its difference to the reference on the seeds that both have, with its
    p-value. The lowest difference comes first."""
    lines = []  # each after its difference
    for arm, runs in arms.items():
        pairs = paired(runs, arms.get(reference, {}))
        difference = mean(pairs) if pairs else math.inf
        against = ""
        if pairs and arm != reference:
            against = f"{difference:+.4f} ({t_test(pairs):.2g})"
        losses = [row["val_loss"] for row in runs.values()]
        spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""

        def average(key, runs=runs):
            return mean(row[key] for row in runs.values())

        cells = [
            arm,
            f"{len(runs)}",
            f"{mean(losses):.4f}{spread}",
            f"{average('val_bpb'):.4f}",
            against,
            f"{average('params'):,.0f}",
            f"{average('tokens'):,.0f}",
            f"{average('flops'):.3g}",
            f"{average('seconds'):.0f}",
            f"{average('prune_cost'):.3f}",
        ]
        lines.append((difference, f"| {' | '.join(cells)} |"))
    lines.sort(key=lambda pair: pair[0])
    heads = [
        *("arm", "seeds", "loss, nats/token", "bits/byte", f"minus {reference} (p)"),
        *("parameters", "tokens", "FLOPs", "seconds", "prunes cost"),
    ]
    text = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    text += [line for _, line in lines]
    seeds = {tuple(sorted(runs)) for runs in arms.values()}
    if len(seeds) > 1:
        warning = "Arms have different seeds: compare the differences, not the losses."
        text += ["", warning]
    return "\n".join(text) + "\n"


@command
def main(argv: list[str]) -> int:
    # Without abbreviations, because --key=value is a knob
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("configs", nargs="*", metavar="CONFIG")
    add("--out", type=expanded, required=True, help="folder of the results")
    add("--runs", type=expanded, help="folder of the runs; default: out/NAME/TABLE")
    add("--seeds", type=seed_range, default="3", help="5: 1 to 5; or 21-30")
    add("--jobs", type=positive, default=1, help="runs side by side")
    add("--reference", default="idea", help="the arm that others are compared to")
    args, knobs = parser.parse_known_args(argv)
    path = args.out / "runs.csv"
    if not args.configs:
        for setting, arms in read_csv(path).items():
            print(f"{setting}\n\n{table(arms, args.reference)}".lstrip())
        return 0

    arms = load_arms(args.configs, knobs, args.reference)
    settings = [arm.setting for arm in arms if arm.setting]
    setting = settings[0] if settings else ""
    folder = args.runs or Path("out") / args.out.name / setting
    known = read_csv(path) if path.exists() else {}
    done = collect(arms, folder)
    check_kept(path, known.get(setting, {}), done)
    todo = []
    for seed in args.seeds:
        for arm in arms:
            if seed not in done.get(arm.name, {}):
                todo.append((arm, seed, folder / arm.name / str(seed)))
    n_runs = len(args.seeds) * len(arms)
    output = f"{folder}/ARM/SEED/output.txt"
    print(f"runs to do: {len(todo)} of {n_runs}, in {output}", flush=True)
    all_good = train_all(todo, args.jobs)
    found = collect(arms, folder)
    if found:
        write(path, known | {setting: found})
        print(table(found, args.reference), end="")
    return 0 if all_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
