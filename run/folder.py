"""What a run leaves in its out_dir (config.json, log.jsonl, checkpoint.pt), and where it starts."""

import json
import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path

from filelock import lock_descriptor  # from 3.30 on: a lock that never changes the file

from data.loader import TokenDataset
from run import UserError
from run.checkpoint import NAME, PREVIOUS, load_checkpoint
from run.config import NOT_SAVED, SHAPE, Config, need
from run.files import write_text
from run.ranks import Ranks
from run.teacher import Teacher

NUMBERS = ("step", "tokens", "flops", "seconds")  # of every event in the log
# Knobs that a resumed run may change: they change the weights by rounding at most.
MAY_CHANGE = NOT_SAVED | {"device", "compile", "init_from", "micro_batch_size", "recompute"}
MAY_CHANGE |= {"eval_every", "eval_tokens", "save_every", "log_every", "teacher"}


class Folder:
    """The out_dir of a run. Rank 0 locks it before anything is read, and alone writes there. The
    lock is the system's: it ends with the process. `files` closes what is open here. Raises
    UserError where another process runs there, nothing can be written, or as `check` does."""

    def __init__(
        self, c: Config, ranks: Ranks, data: TokenDataset, teacher: Teacher | None, files: ExitStack
    ):
        self.path, self.ranks, self.files = Path(c.out_dir), ranks, files
        self.main = ranks.rank == 0
        self.digests = {"data": data.digest, "tokenizer": data.tokenizer_digest}
        self.digests["teacher"] = teacher.digest if teacher else ""
        if self.main:
            self.take()
        self.has_checkpoint = any((self.path / name).exists() for name in (NAME, PREVIOUS))
        self.check(c)

    def take(self) -> None:
        where = f"out_dir={self.path}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # To append: it may be a file of the user's
            lock = self.files.enter_context(open(self.path / "lock", "ab"))  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{where}: cannot write there: {error}") from error
        try:
            if not lock_descriptor(lock.fileno(), blocking=False):
                raise UserError(f"{where}: another process is running there; choose another")
        except OSError:  # some network disks have no locks
            print(f"{where}: its disk has no locks; start no second run there", file=sys.stderr)

    def check(self, c: Config) -> None:
        """Refuse to write over another run, what it learns from, or foreign files: UserError."""
        own = [(self.path / name).resolve() for name in ("", NAME, PREVIOUS)]
        for key in ("init_from", "teacher"):
            other = not getattr(c, key) or Path(getattr(c, key)).resolve() not in own
            need(other, c, key, "the run would write over it; choose another out_dir")
        held = [n for n in ("config.json", "log.jsonl", NAME, PREVIOUS) if (self.path / n).exists()]
        log = read_log(self.path) if c.resume and not self.has_checkpoint else []
        config = self.path / "config.json"  # a run writes it before all else, and never removes it
        if held and not (config.is_file() and b'"max_steps"' in config.read_bytes()):
            what = f"holds {held[0]}, but no config.json of a run; choose another out_dir"
        elif held and not (c.overwrite or c.resume):
            way = "--resume goes on with it, --overwrite replaces it, --out_dir=F writes elsewhere"
            what = f"holds a run; {way}"
        elif "save" in [e["event"] for e in log if "error" not in e]:  # one that did not fail
            what = "holds a run, but its checkpoint is gone; remove the folder to begin again"
        else:
            return
        raise UserError(f"out_dir={c.out_dir}: {what}")

    def load(self, c: Config) -> tuple[Config, dict]:
        """The config with the shape that the run began with, and its checkpoint. Raises UserError
        where it is of another config, of other data or with another teacher."""
        path = self.path / NAME
        saved = load_checkpoint(path)
        then = saved["config"]
        if c.init_from:  # the shape that it gave then; the checkpoint may be narrower by now
            c = replace(c, **{key: then[key] for key in SHAPE})
        changed = [k for k, v in vars(c).items() if k not in MAY_CHANGE and v != then[k]]
        if changed:
            what = ", ".join(f"{k}={then[k]!r} there, {getattr(c, k)!r} here" for k in changed)
            raise UserError(f"{path}: another run's checkpoint ({what}); choose another out_dir")
        for what, knob in (("data", "data_dir"), ("teacher", "teacher")):
            if saved.get(what) != self.digests[what]:
                other = f"{knob}={getattr(c, knob)} is not the {what} that the run began with"
                raise UserError(f"{path}: {other}; put that back, or choose another out_dir")
        return c, saved

    def open_log(self, c: Config, step: int) -> float:
        """Write config.json, and drop from log.jsonl what a run that goes on after `step` does
        again. Returns the seconds that the steps before took."""
        self.unwritten = b""
        if not self.main:
            return 0.0
        if step == 0:
            for name in (NAME, PREVIOUS, "log.jsonl"):
                (self.path / name).unlink(missing_ok=True)
        write_text(self.path / "config.json", json.dumps(asdict(c), indent=1))
        kept = [e for e in read_log(self.path) if e["step"] <= step and e["event"] != "done"]
        write_text(self.path / "log.jsonl", "".join(json.dumps(event) + "\n" for event in kept))
        log = open(self.path / "log.jsonl", "ab", buffering=0)  # noqa: SIM115
        self.file = self.files.enter_context(log)
        return kept[-1]["seconds"] if kept else 0.0

    def write(self, event: dict) -> None:
        """Add a line to the log at once. If the disk is full, keep it for the next call."""
        if self.main:
            self.unwritten += json.dumps(event).encode() + b"\n"
            with suppress(OSError):
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]


def read_log(folder: Path) -> list[dict]:
    """The events of a run so far, in order; [] where there is no log. A kill may have cut the last
    line: it is left out. Raises UserError for another that is no event."""
    path, events = folder / "log.jsonl", []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            events.append(json.loads(line))
            events[-1]["event"], sum(events[-1][key] for key in NUMBERS)  # all there, and numbers
        except (ValueError, LookupError, TypeError) as error:
            what = f"line {number} is damaged, or no event of a run; remove it"
            raise UserError(f"{path}: {what}") from error
    return events
