"""The out_dir of a run (config.json, log.jsonl, checkpoint.pt): what is refused there, what a run
writes and prints: its plan, lines on the way, the end."""

import hashlib
import json
import math
import os
import shlex
import subprocess
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from data import UserError, drop_output, lock
from data.loader import TokenDataset
from model import KINDS, GPTConfig
from run.checkpoint import NAME, Teacher, drop_kept, load_checkpoint, write_checkpoint, write_text
from run.config import MAY_CHANGE, RESCUE, SHAPE, Config, need
from run.cost import GPUS, Plan, card_of, n_parameters
from run.machine import RESCUED, Machine


class OutDir:
    """The out_dir of a run, its log, and what is printed. Rank 0 locks it before it reads it,
    and alone writes and prints. `files` closes what is open here. Raises UserError where another
    process runs there, nothing can be written, or as `check` does. teacher: or None."""

    def __init__(
        self, c: Config, machine: Machine, data: TokenDataset, teacher: Teacher, files: ExitStack
    ):
        self.path, self.machine, self.files, self.data = Path(c.out_dir), machine, files, data
        self.main = machine.rank == 0
        self.digests = {"data": data.digest, "tokenizer": data.tokenizer_digest}
        self.digests["teacher"] = teacher.digest if teacher else ""
        if self.main:
            try:
                lock(self.path, f"out_dir={self.path}", files)
            except OSError as error:
                raise UserError(f"out_dir={self.path}: cannot write there: {error}") from error
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

    def begin(self, c: Config, plan: Plan, val: TokenDataset, step: int, compiled: bool) -> None:
        """At step 0, remove the checkpoint and the log of a run that is replaced; later, the log's
        events after `step`, which come again. Write config.json, print the plan, log the start."""
        self.c, self.plan, self.unwritten = c, plan, b""
        self.nats_per_bpb = math.log(2) * val.bytes_per_target(c.eval_tokens)  # nats per token
        need(self.nats_per_bpb, c, "eval_tokens", "none of them is text; give more")
        self.began = time.perf_counter()
        self.speed_from = step, self.began  # speed is measured from this step and time
        self.saved = step  # the step that checkpoint.pt is of; 0: there is none
        if self.main:
            if step == 0:
                drop_kept(self.path, 0, 0)
                for name in (NAME, "log.jsonl"):
                    (self.path / name).unlink(missing_ok=True)
            write_text(self.path / "config.json", json.dumps(asdict(c), indent=1))
            log = self.path / "log.jsonl"
            kept = [e for e in read_log(self.path) if e["step"] <= step and e["event"] != "done"]
            write_text(log, "".join(json.dumps(event) + "\n" for event in kept))
            self.file = self.files.enter_context(open(log, "ab", buffering=0))  # noqa: SIM115
            self.began -= kept[-1]["seconds"] if kept else 0.0  # as if it had never stopped
        self.print_plan(step, compiled)
        values = {"resumed": step > 0, "planned_flops": plan.flops(), **self.digests}
        values |= {"torch": torch.__version__, "hardware": self.machine.hardware()}
        values |= {"changed": self.changed} if self.changed else {}
        values |= {"commit": commit() if self.main else "", "code": code_digest()}
        self.write("start", step, **values)

    def write(self, event: str, step: int, **values) -> None:
        """Add a line to the log at once; if the disk is full, keep it for the next call. A prune
        comes before its step is trained, all else after it."""
        trained = step - (event == "prune")
        if event != "step":  # validations, saves and prunes do not count (DDP's new wrap does)
            self.speed_from = trained, time.perf_counter()
        line = {"event": event, "step": step, "tokens": trained * self.plan.tokens_per_step}
        seconds = round(time.perf_counter() - self.began, 3)
        line |= {"flops": self.plan.flops(trained), "seconds": seconds} | values
        if self.main:
            self.unwritten += json.dumps(line).encode() + b"\n"
            with suppress(OSError):
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def say(self, text: str) -> None:
        """Print. If that fails (`| head -1`, a full disk), the run goes on in silence."""
        if self.main:
            try:
                print(text, flush=True)
            except OSError:
                drop_output()

    def print_plan(self, step: int, compiled: bool) -> None:
        c, plan, machine, text = self.c, self.plan, self.machine, self.data.tokens
        tokens, final = c.max_steps * plan.tokens_per_step, n_parameters(plan.final)
        self.say(f"data       {c.data_dir}: {compact(text)} tokens, {tokens / text:.3g} epochs")
        heads = f"{c.n_head} heads over {c.n_kv_head} KV heads"
        shape = f"{c.n_layer} layers, d_model {c.d_model}, d_ff {c.d_ff}, {heads}"
        self.say(f"model      {compact(n_parameters(plan.enlarged))} parameters: {shape}")
        size = f"{c.max_steps} steps of {c.batch_size} x {c.context_length}: {compact(tokens)}"
        self.say(f"run        {size} tokens, {tokens / final:.3g} per final parameter")
        flops = f"compute    {plan.flops():.3g} training FLOPs"
        if steps := plan.schedule.prune_steps():
            ways = [f"{k} {w.enlarged} -> {w.target}" for k, w in plan.schedule.widths.items()]
            many = f"in {len(steps)} prunes, steps {steps[0]} to {steps[-1]}"
            when = many if len(steps) > 1 else f"in one prune, step {steps[0]}"
            self.say(f"prune      {', '.join(ways)} {when}; {compact(final)} parameters remain")
            more = plan.flops() / (tokens * plan.token_flops(plan.final)) - 1
            flops += f", {more:.0%} more than the final model's"
        self.say(flops)
        how = f"{c.dtype}, {'compiled' if compiled else 'eager'}"
        threads = f", threads: {torch.get_num_threads()}" if machine.device.type == "cpu" else ""
        self.say(f"machine    {machine.device.type}, ranks: {machine.ranks}{threads}, {how}")
        self.say(f"output     {c.out_dir}" + (f", going on from step {step}" if step else ""))

    def prune(
        self, step: int, shape: GPTConfig, kind: str, before: float, after: float, record: dict
    ) -> None:
        """shape: after it. before, after: the loss, on the same batches."""
        was, now = self.plan.schedule.width(step - 1, kind), getattr(shape, kind)
        values = {"kind": kind, "width_before": was, "width_after": now}
        values |= {"params": n_parameters(shape), "loss_before": before, "loss_after": after}
        self.write("prune", step, **values, **record)
        self.say(f"prune      step {step}: {kind} {was} -> {now}, loss {before:.4f} -> {after:.4f}")

    def step(self, step: int, shape: GPTConfig, loss: float, lr: float, grad_norm: float) -> None:
        (first, began), now = self.speed_from, time.perf_counter()
        self.speed_from = step, now
        speed = (step - first) * self.plan.tokens_per_step / (now - began)
        phase, params = self.plan.schedule.phase(step), n_parameters(shape)
        widths = {kind: getattr(shape, kind) for kind in KINDS}
        values = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": round(speed)}
        if card := card_of(self.machine.device):  # the share of its peak in bfloat16
            flops = self.plan.token_flops(shape) * speed / self.machine.ranks
            values["mfu"] = round(flops / GPUS[card][0], 4)
        self.write("step", step, **values, params=params, **widths, phase=phase)
        flops = self.plan.flops() - self.plan.flops(step)
        left = tqdm.format_interval(flops / (self.plan.token_flops(shape) * speed))
        pace = f"{compact(speed)} tok/s {compact(params)} parameters {left} left"
        pace += f" MFU {values['mfu']:.0%}" if card else ""
        self.say(f"step {step:6}/{self.c.max_steps}  loss {loss:.4f} {pace} lr {lr:.1e} {phase}")

    def skip(self, step: int) -> None:
        """Log a step whose gradients were not finite in float16, so that it changed no weight. The
        scale of gradients has fallen. Raises UserError where it is below 1."""
        scale = self.machine.scaler.get_scale()
        self.write("skip", step, scale=scale)
        self.say(f"skip       step {step}: gradients overflow in float16; scale {scale:g}")
        if scale < 1:
            raise UserError(f"step {step}: gradients overflow at any scale; {RESCUED}", 1)

    def eval(self, step: int, val_loss: float) -> None:
        bits = val_loss / self.nats_per_bpb
        self.write("eval", step, val_loss=val_loss, val_bpb=bits)
        self.say(f"eval       step {step}: {val_loss:.4f} nats per token, {bits:.4f} bits per byte")

    def save_checkpoint(self, step: int, model, optimizers, scores: dict, must: bool) -> None:
        """Save a checkpoint. If that fails, the run goes on and tries again at the next save; but a
        last save `must` succeed. Raises UserError, also where the data has been replaced."""
        self.data.check()
        try:
            if self.main:
                scale = self.machine.scaler.state_dict()  # {} but in float16
                more = self.digests | ({"scaler": scale} if scale else {})
                write_checkpoint(self.c, step, model, optimizers, scores, more, self.saved)
                self.saved = step
            self.write("save", step)
        except OSError as error:
            self.write("save", step, error=str(error))
            if must:
                raise UserError(f"step {step}: {error}", 1) from error
            self.say(f"save       step {step}: {error}; trying again at the next save")
        if must:  # wait for rank 0: where another exits first, with 128 + n, torchrun ends them all
            self.machine.means(0.0)

    def stopped(self, step: int) -> None:
        way = f"python train.py {shlex.quote(self.c.out_dir)} --resume"
        self.say(f"stopped after step {step}, saved in {self.c.out_dir}; {way} goes on")

    def done(self, step: int, val_loss: float) -> None:
        bits, params = val_loss / self.nats_per_bpb, n_parameters(self.plan.final)
        self.write("done", step, val_loss=val_loss, val_bpb=bits, params=params)
        self.say(f"\nloss       {val_loss:.4f} nats per token on the validation split")
        self.say(f"seconds    {time.perf_counter() - self.began:.0f}")
        self.say(f"sample     python -m tools.sample {shlex.quote(self.c.out_dir)}")
        self.say(f"picture    python -m tools.plot {shlex.quote(self.c.out_dir)}")


def read_log(folder: Path) -> list[dict]:
    """The events of a run so far, in order; [] where there is no log. A kill may have cut the last
    line: it is left out. Raises UserError for another that is no event."""
    path, events = folder / "log.jsonl", []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            events.append(e := json.loads(line))
            e["event"], sum(e[key] for key in ("step", "tokens", "flops", "seconds"))  # or errors
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path}: line {number} is no event of a run; remove it") from error
    return events


def commit() -> str:
    """The git commit of this code, with -dirty where a file has changed; "" without git."""
    call = "git --no-optional-locks --git-dir=.git --work-tree=. describe --always --abbrev=40"
    call, root = [*call.split(), "--exclude=*", "--dirty"], Path(__file__).parent.parent
    try:
        return subprocess.run(call, cwd=root, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def code_digest() -> str:
    """The sha256 of the code that decides what a run computes."""
    root = Path(__file__).parent.parent
    files = [root / f"{name}.py" for name in ("train", "prune", "schedule", "model")]
    files += sorted(p for name in ("run", "data") for p in (root / name).glob("[!.]*.py"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()


def compact(n: float) -> str:
    """1234567 -> '1.23M'."""
    return tqdm.format_sizeof(n).replace("G", "B")
