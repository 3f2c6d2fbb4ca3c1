"""The log of a run, log.jsonl: an event a line. And what a run prints."""

import json
import shlex
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data.command import UserError, drop_output
from model import KINDS, GPTConfig
from run.checkpoint import write_text
from run.config import Config
from run.cost import GPUS, Plan, card_of, n_parameters
from run.machine import RESCUED, Machine


class Log:
    """What a run logs and prints, by rank 0 alone. At its start, the events after `step` go, as
    they come again. nats_per_bpb: the nats per token that are one bit per byte of text."""

    def __init__(self, c: Config, plan: Plan, machine: Machine, nats_per_bpb: float, step: int):
        self.c, self.plan, self.machine, self.nats_per_bpb = c, plan, machine, nats_per_bpb
        self.path, self.main = Path(c.out_dir) / "log.jsonl", machine.rank == 0
        self.began = time.perf_counter()
        self.speed_from = step, self.began  # speed is measured from this step and time
        if self.main:
            events = [e for e in read_log(self.path.parent) if e["step"] <= step]
            kept = [e for e in events if e["event"] != "done"]
            write_text(self.path, "".join(json.dumps(event) + "\n" for event in kept))
            self.began -= kept[-1]["seconds"] if kept else 0.0  # as if it had never stopped

    def write(self, event: str, step: int, **values) -> None:
        """Add a line to the log at once. Raises UserError where the disk is full."""
        trained = step - 1 if event == "prune" else step  # the steps that are done by now
        if event != "step":  # validations, saves and prunes do not count (DDP's new wrap does)
            self.speed_from = trained, time.perf_counter()
        line = {"event": event, "step": step, "tokens": trained * self.plan.tokens_per_step}
        seconds = round(time.perf_counter() - self.began, 3)
        line |= {"flops": self.plan.flops(trained), "seconds": seconds} | values
        if self.main:
            try:
                with open(self.path, "ab") as file:
                    file.write(json.dumps(line).encode() + b"\n")
            except OSError as error:
                raise UserError(f"step {step}: cannot write the log: {error}", 1) from error

    def say(self, text: str) -> None:
        """Print. If that fails (`| head -1`, a full disk), the run goes on in silence."""
        if self.main:
            try:
                print(text, flush=True)
            except OSError:
                drop_output()

    def print_plan(self, text: int, step: int, compiled: bool) -> None:
        """Print what the run will do. text: the tokens of its data."""
        c, plan, machine = self.c, self.plan, self.machine
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

    def log_prune(
        self, step: int, shape: GPTConfig, kind: str, before: float, after: float, record: dict
    ) -> None:
        """shape: after it. before, after: the loss, on the same batches."""
        was, now = self.plan.schedule.width(step - 1, kind), getattr(shape, kind)
        values = {"kind": kind, "width_before": was, "width_after": now}
        values |= {"params": n_parameters(shape), "loss_before": before, "loss_after": after}
        self.write("prune", step, **values, **record)
        self.say(f"prune      step {step}: {kind} {was} -> {now}, loss {before:.4f} -> {after:.4f}")

    def log_step(
        self, step: int, shape: GPTConfig, loss: float, lr: float, grad_norm: float
    ) -> None:
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

    def log_skip(self, step: int) -> None:
        """Log a step whose gradients were not finite in float16, so that it changed no weight. The
        scale of gradients has fallen. Raises UserError where it is below 1."""
        scale = self.machine.scaler.get_scale()
        self.write("skip", step, scale=scale)
        self.say(f"skip       step {step}: gradients overflow in float16; scale {scale:g}")
        if scale < 1:
            raise UserError(f"step {step}: gradients overflow at any scale; {RESCUED}", 1)

    def log_eval(self, step: int, val_loss: float) -> None:
        bits = val_loss / self.nats_per_bpb
        self.write("eval", step, val_loss=val_loss, val_bpb=bits)
        self.say(f"eval       step {step}: {val_loss:.4f} nats per token, {bits:.4f} bits per byte")

    def print_stop(self, step: int) -> None:
        way = f"python train.py {shlex.quote(self.c.out_dir)} --resume"
        self.say(f"stopped after step {step}, saved in {self.c.out_dir}; {way} goes on")

    def log_done(self, step: int, val_loss: float) -> None:
        bits, params = val_loss / self.nats_per_bpb, n_parameters(self.plan.final)
        self.write("done", step, val_loss=val_loss, val_bpb=bits, params=params)
        self.say(f"\nloss       {val_loss:.4f} nats per token on the validation split")
        self.say(f"seconds    {time.perf_counter() - self.began:.0f}")
        self.say(f"sample     python -m tools.sample {shlex.quote(self.c.out_dir)}")
        self.say(f"picture    python -m tools.plot {shlex.quote(self.c.out_dir)}")


def read_log(folder: Path) -> list[dict]:
    """The events of a run so far, in order; [] where there is no log. A kill may have cut the last
    line: it is left out."""
    path = folder / "log.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def compact(n: float) -> str:
    """1234567 -> '1.23M'."""
    return tqdm.format_sizeof(n).replace("G", "B")
