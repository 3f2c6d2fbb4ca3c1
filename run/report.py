"""What a run says to a person, and writes to its log: its plan, lines on the way, the end."""

import math
import shlex
import time

from tqdm import tqdm

from data import drop_output
from data.loader import TokenDataset
from model import KINDS, GPTConfig
from run import UserError
from run.checkpoint import write_checkpoint
from run.config import Config, need
from run.cost import Plan, n_parameters
from run.folder import Folder


def compact(n: float) -> str:
    """1234567 -> '1.23M'."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= 0.9995 * size:  # 999.6 million is 1 billion in three digits
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


class Report:
    """Prints and logs what happens in a run that goes on after `step`. Only rank 0 does so."""

    def __init__(self, c: Config, plan: Plan, val: TokenDataset, folder: Folder, step: int):
        self.c, self.plan, self.val, self.folder = c, plan, val, folder
        self.bytes_per_token = val.bytes_per_target(c.eval_tokens)
        need(self.bytes_per_token, c, "eval_tokens", "none of them is text; give more")
        self.began = time.perf_counter() - folder.open_log(c, step)  # as if it had never stopped
        self.speed_from = step, time.perf_counter()  # speed is measured from this step and time

    def say(self, text: str) -> None:
        """Print. If that fails (`| head -1`, a full disk), the run goes on in silence."""
        if self.folder.main:
            try:
                print(text, flush=True)
            except OSError:
                drop_output()

    def say_rows(self, rows: dict[str, str]) -> None:
        self.say("\n".join(f"{name:<11}{text}" for name, text in rows.items()))

    def write(self, event: str, step: int, **values) -> None:
        """Write a line to the log. A prune comes before its step is trained, all else after it."""
        trained = step - (event == "prune")
        if event != "step":  # the time of validations, saves and prunes does not count as training
            self.speed_from = trained, time.perf_counter()
        line = {"event": event, "step": step, "tokens": trained * self.plan.tokens_per_step}
        line |= {"flops": self.plan.flops(trained), "seconds": self.seconds()} | values
        self.folder.write(line)

    def seconds(self) -> float:
        return round(time.perf_counter() - self.began, 3)

    def print_plan(self, step: int, data: TokenDataset, machine: str) -> None:
        c, plan, schedule = self.c, self.plan, self.plan.schedule
        final = n_parameters(plan.final)
        tokens, seen = c.max_steps * plan.tokens_per_step, min(self.val.tokens, c.eval_tokens)
        rows = {
            "data": f"{c.data_dir}: {compact(data.tokens)} tokens, vocabulary of {data.vocab_size};"
            f" validation on {compact(seen)} of {compact(self.val.tokens)} tokens",
            "model": f"{compact(n_parameters(plan.enlarged))} parameters: {c.n_layer} layers, "
            f"d_model {c.d_model}, d_ff {c.d_ff}, {c.n_head} heads over {c.n_kv_head} KV heads",
            "run": f"{c.max_steps} steps of {c.batch_size} x {c.context_length}: {compact(tokens)}"
            f" tokens, {tokens / data.tokens:.3g} epochs, {tokens / final:.3g} per final parameter",
        }
        compute = f"{plan.flops():.3g} training FLOPs"
        if steps := schedule.prune_steps():
            ways = [f"{k} {w.enlarged} -> {w.target}" for k, w in schedule.widths.items()]
            many = f"in {len(steps)} prunes, steps {steps[0]} to {steps[-1]}"
            when = many if len(steps) > 1 else f"in one prune, step {steps[0]}"
            rows["prune"] = f"{', '.join(ways)} {when}; {compact(final)} parameters remain"
            left = schedule.rate_share(steps[-1], c.max_steps)
            rest = f"{1 - steps[-1] / c.max_steps:.0%} of the steps follow the last prune; their "
            rows["recover"] = f"{rest}learning rates sum to {left:.0%} of the run's"
            wide, small = (plan.token_flops(s) * tokens for s in (plan.enlarged, plan.final))
            compute += f", {1 - plan.flops() / wide:.0%} less than the enlarged model's"
            compute += f", {plan.flops() / small - 1:.0%} more than the final one's"
        if plan.teacher:
            what = f"{c.teacher}: {compact(n_parameters(plan.teacher))} parameters"
            rows["teacher"] = f"{what}, weight {c.teacher_weight:g} in the targets"
        output = c.out_dir + (f", going on from step {step}" if step else "")
        self.say_rows(rows | {"compute": compute, "machine": machine, "output": output})
        self.write("start", step, resumed=step > 0, planned_flops=plan.flops(), data=data.digest)

    def prune(self, step: int, kind: str, before: float, after: float, record: dict) -> None:
        """before, after: loss on the same batches."""
        was, now = (self.plan.schedule.width(s, kind) for s in (step - 1, step))
        losses = {"loss_before": before, "loss_after": after}
        self.write("prune", step, kind=kind, width_before=was, width_after=now, **losses, **record)
        self.say(f"prune      step {step}: {kind} {was} -> {now}, loss {before:.4f} -> {after:.4f}")

    def step(self, step: int, shape: GPTConfig, loss: float, lr: float, grad_norm: float) -> None:
        (first, began), now = self.speed_from, time.perf_counter()
        self.speed_from = step, now
        speed = (step - first) * self.plan.tokens_per_step / (now - began)
        phase, params = self.plan.schedule.phase(step), n_parameters(shape)
        widths = {kind: getattr(shape, kind) for kind in KINDS}
        values = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": round(speed)}
        self.write("step", step, **values, params=params, **widths, phase=phase)
        flops = self.plan.flops() - self.plan.flops(step)
        left = tqdm.format_interval(flops / (self.plan.token_flops(shape) * speed))
        pace = f"{compact(speed)} tok/s {compact(params)} parameters {left} left"
        self.say(f"step {step:6}/{self.c.max_steps}  loss {loss:.4f} {pace} lr {lr:.1e} {phase}")

    def eval(self, step: int, val_loss: float) -> None:
        bits = self.bits(val_loss)
        self.write("eval", step, val_loss=val_loss, val_bpb=bits)
        self.say(f"eval       step {step}: {val_loss:.4f} nats per token, {bits:.4f} bits per byte")

    def bits(self, nats_per_token: float) -> float:
        """Bits per byte of the validation text."""
        return nats_per_token / math.log(2) / self.bytes_per_token

    def save_checkpoint(self, step: int, model, optimizers, scores: dict, must: bool) -> None:
        """Save a checkpoint. If that fails, the run goes on and tries again at the next save; but a
        last save `must` succeed. Raises UserError."""
        try:
            if self.folder.main:
                write_checkpoint(self.c, step, model, optimizers, scores, self.folder.digests)
            self.write("save", step)
        except OSError as error:
            self.write("save", step, error=str(error))
            if must:
                raise UserError(f"step {step}: {error}", 1) from error
            self.say(f"save       step {step}: {error}; trying again at the next save")
        if must:  # wait for rank 0: once a rank has left as after a signal, torchrun ends all
            self.folder.ranks.means(0.0)

    def diverged(self, step: int, loss: float, norm: float, lr: float) -> UserError:
        what = f"step {step}: loss {loss}, gradient norm {norm}, learning rate {lr:.2e}: not finite"
        way = "start again with a lower --learning_rate or a longer --warmup_steps"
        return UserError(f"{what}; {way}", 1)

    def stopped(self, step: int) -> None:
        way = f"python train.py {shlex.quote(self.c.out_dir)} --resume"
        self.say(f"stopped after step {step}, saved in {self.c.out_dir}; {way} goes on")

    def done(self, step: int, val_loss: float) -> None:
        first, last = n_parameters(self.plan.enlarged), n_parameters(self.plan.final)
        bits = self.bits(val_loss)
        self.write("done", step, val_loss=val_loss, val_bpb=bits, params=last)
        folder = shlex.quote(self.c.out_dir)
        rows = {
            "parameters": f"{last:,}" + (f", enlarged {first:,}" if first != last else ""),
            "FLOPs": f"{self.plan.flops():.4g}",
            "loss": f"{val_loss:.4f} nats per token on the validation split",
            "bits/byte": f"{bits:.4f}",
            "seconds": f"{self.seconds():.0f}",
            "sample": f"python -m tools.sample {folder}",
            "picture": f"python -m tools.plot {folder}",
        }
        self.say("")
        self.say_rows(rows)
