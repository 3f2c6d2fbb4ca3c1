"""The out_dir of a run (config.json, log.jsonl, checkpoint.pt): what is refused there, how a run
begins in it, and its saves."""

import hashlib
import json
import math
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from filelock import lock_descriptor  # from 3.30 on: a lock that never changes the file

from data.command import UserError
from data.loader import TokenDataset
from run.checkpoint import NAME, drop_kept, load_checkpoint, write_checkpoint, write_text
from run.config import MAY_CHANGE, PATHS, RESCUE, SHAPE, Config, check_config, need
from run.cost import Plan
from run.log import Log, read_log
from run.machine import Machine
from run.teacher import Teacher


class OutDir:
    """The out_dir of a run. Rank 0 locks it before it reads it, and alone writes there. `files`
    unlocks it. Raises UserError where another process runs there, nothing can be written, or as
    `check` does. teacher: or None."""

    def __init__(
        self, c: Config, machine: Machine, data: TokenDataset, teacher: Teacher, files: ExitStack
    ):
        self.path, self.machine, self.data = Path(c.out_dir), machine, data
        self.main = machine.rank == 0
        self.digests = {"data": data.digest, "tokenizer": data.tokenizer_digest}
        self.digests["teacher"] = teacher.digest if teacher else ""
        if self.main:
            lock(self.path, files)
        self.has_checkpoint = (self.path / NAME).exists()
        self.changed: dict[str, list] = {}  # by --changed: knob -> [value there, value here]
        self.check(c)

    def check(self, c: Config) -> None:
        """Refuse to write over another run, what it learns from, or foreign files: UserError."""
        own = [(self.path / name).resolve() for name in ("", NAME)]
        for key in ("init_from", "teacher"):
            other = not getattr(c, key) or Path(getattr(c, key)).resolve() not in own
            need(other, c, key, "the run would write over it; choose another out_dir")
        held = [n for n in ("config.json", "log.jsonl", NAME) if (self.path / n).exists()]
        log = read_log(self.path) if c.resume and not self.has_checkpoint else []
        config = self.path / "config.json"  # written before the others, and never removed
        if held and not (config.is_file() and b'"max_steps"' in config.read_bytes()):
            what = f"holds {held[0]}, but no config.json of a run; choose another out_dir"
        elif held and not (c.overwrite or c.resume):
            what = "holds a run; --resume goes on with it, --overwrite replaces it"
        elif "save" in [e["event"] for e in log]:
            what = "holds a run, but its checkpoint is gone; remove the folder to begin again"
        else:
            return
        raise UserError(f"out_dir={c.out_dir}: {what}")

    def load_checkpoint(self, c: Config) -> tuple[Config, dict]:
        """The config with the shape that the run began with, and its checkpoint. Raises UserError
        where it is of another config, of other data or with another teacher."""
        path = self.path / NAME
        saved = load_checkpoint(path)
        then = saved["config"]
        if c.init_from:  # the shape that it gave then; the checkpoint may be narrower by now
            c = replace(c, **{key: then[key] for key in SHAPE})
            check_config(c)  # now that it has a schedule
        changed = [k for k, v in vars(c).items() if k not in MAY_CHANGE and v != then[k]]
        if c.changed:
            self.changed = {k: [then[k], getattr(c, k)] for k in changed if k in RESCUE}
            changed = [k for k in changed if k not in RESCUE]
        start, here = then["init_from"], c.init_from  # not read again, so it may be gone, or moved
        moved = start and here and not os.path.exists(start)
        if not moved and (start and os.path.realpath(start)) != (here and os.path.realpath(here)):
            changed.append("init_from")
        if changed:
            what = ", ".join(f"{k}={then[k]!r} there, {getattr(c, k)!r} here" for k in changed)
            way = "give --changed, too, or " if RESCUE.issuperset(changed) else ""
            raise UserError(
                f"{path}: another run's checkpoint ({what}); {way}choose another out_dir"
            )
        for what, knob in (("data", "data_dir"), ("teacher", "teacher")):
            if saved.get(what) != self.digests[what]:
                raise UserError(f"{path}: {knob}={getattr(c, knob)} is not the {what} of its start")
        return c, saved

    def check_start(self, c: Config, saved: dict | None) -> int:
        """The steps that are done, in what a run starts from. Waits for all ranks: from here on,
        rank 0 may write. Raises UserError where the ranks would not do the same run."""
        saved = saved or {"step": 0}
        self.digests["init_from"] = saved.get("init_from", "")
        same = {k: v for k, v in vars(c).items() if k not in PATHS}  # paths may differ by machine
        entries = [("step", saved["step"]), *self.digests.items(), *same.items()]
        for name, value in self.machine.entries_that_differ(entries):
            raise UserError(f"{name}={value!r} on this rank, another elsewhere; let them agree", 1)
        return saved["step"]

    def begin(self, c: Config, plan: Plan, val: TokenDataset, step: int, compiled: bool) -> Log:
        """At step 0, remove the log and the checkpoints of a run that is replaced. Write
        config.json, print the plan, log the start. Returns the log."""
        nats_per_bpb = math.log(2) * val.bytes_per_target(c.eval_tokens)
        if self.main:
            if step == 0:
                drop_kept(self.path, 0, 0)
                for name in (NAME, "log.jsonl"):
                    (self.path / name).unlink(missing_ok=True)
            write_text(self.path / "config.json", json.dumps(asdict(c), indent=1))
        self.c, self.log = c, Log(c, plan, self.machine, nats_per_bpb, step)
        self.saved = step  # the step that checkpoint.pt is of; 0: there is none
        self.log.print_plan(self.data.tokens, step, compiled)
        values = {"resumed": step > 0, "planned_flops": plan.flops(), **self.digests}
        values |= {"torch": torch.__version__, "hardware": self.machine.hardware()}
        values |= {"changed": self.changed} if self.changed else {}
        self.log.write("start", step, **values, code=code_digest())
        return self.log

    def save_checkpoint(self, step: int, model, optimizers, scores: dict) -> None:
        """Save a checkpoint. Raises UserError if that fails."""
        scale = self.machine.scaler.state_dict()  # {} but in float16
        others = self.digests | ({"scaler": scale} if scale else {})
        try:
            if self.main:
                write_checkpoint(self.c, step, model, optimizers, scores, others, self.saved)
        except OSError as error:
            what = "the former checkpoint is whole, and --resume goes on"
            raise UserError(f"step {step}: {error}; {what}", 1) from error
        self.saved = step
        self.log.write("save", step)


def lock(path: Path, files: ExitStack) -> None:
    """Make the folder, and lock it until `files` closes or the process ends: it is the system's
    lock. Raises UserError where another process has it, or nothing can be written."""
    no_link = os.O_CREAT | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)  # it would lead elsewhere
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = os.open(path / "lock", no_link, 0o666)  # of whatever it holds, nothing changes
    except OSError as error:
        raise UserError(f"out_dir={path}: cannot write there: {error}") from error
    files.callback(os.close, file)
    try:
        if not lock_descriptor(file, blocking=False):
            raise UserError(f"out_dir={path}: another process is at work there; choose another")
    except OSError:  # some network disks have no locks
        print(f"out_dir={path}: its disk has no locks; start no second run there", file=sys.stderr)


def code_digest() -> str:
    """The sha256 of the code that decides what a run computes."""
    root = Path(__file__).parent.parent
    files = [root / f"{name}.py" for name in ("train", "prune", "schedule", "model")]
    files += sorted(p for name in ("run", "data") for p in (root / name).glob("[!.]*.py"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()
