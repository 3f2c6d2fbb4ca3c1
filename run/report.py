"""What a run says to a person: its plan at first, lines on the way, a table at the end."""

import contextlib
import shlex
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from data.loader import TokenDataset
from model import GPTConfig
from run.config import Config, ConfigError, Plan, prune_targets


def compact(n: float) -> str:
    """1234567 -> '1.23M'."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def clock(seconds: float) -> str:
    """3723 -> '1h02m', 62 -> '1m02s'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def one_or_all(widths: list[int]) -> int | list[int]:
    """A number while all layers are equally wide, else one per layer."""
    return widths[0] if len(set(widths)) == 1 else widths


def describe(c: Config, plan: Plan, data: TokenDataset, val: TokenDataset, machine: str) -> str:
    full, final = plan.shapes[0][0], plan.shapes[-1][0]
    tokens = c.max_steps * c.batch_size * c.context_length
    seen = min(val.tokens, c.eval_tokens)
    rows = {
        "data": f"{c.data_dir}: {compact(data.tokens)} tokens, vocabulary of {data.vocab_size}; "
        f"validation on {compact(seen)} of {compact(val.tokens)} tokens",
        "model": f"{compact(full.n_parameters())} parameters: {c.n_layer} layers, d_model "
        f"{c.d_model}, d_ff {c.d_ff}, {c.n_head} heads over {c.n_kv_head} KV heads",
        "run": f"{c.max_steps} steps of {c.batch_size} x {c.context_length}: "
        f"{compact(tokens)} tokens, {tokens / data.tokens:.2g} epochs, "
        f"{tokens / final.n_parameters():.3g} per final parameter",
    }
    saving = ""
    if plan.schedule.window:
        first, last = plan.shapes[0][1] + 1, c.max_steps - plan.shapes[-1][1] + 1
        ways = [f"{kind} {wide} -> {slim}" for kind, (wide, slim, _) in prune_targets(c).items()]
        rows["prune"] = (
            f"{', '.join(ways)} in {len(plan.shapes) - 1} prunes, steps {first} to {last}; "
            f"{compact(final.n_parameters())} parameters remain"
        )
        saving = f", {1 - plan.flops / plan.enlarged_flops:.0%} less than without pruning"
    rows |= {"compute": f"{plan.flops:.3g} training FLOPs{saving}", "machine": machine}
    return "\n".join(f"{name:<9}{text}" for name, text in rows.items())


def step_line(loss: float, speed: float, shape: GPTConfig, left: float) -> str:
    """Where the run is, short enough to stand behind the step in a terminal of 80 columns.

    speed: tokens per second; left: seconds.
    """
    d_ff, n_kv_head = (
        f"{min(w)}" if min(w) == max(w) else f"{min(w)}-{max(w)}"
        for w in (shape.d_ff, shape.n_kv_head)
    )
    speed, left = compact(speed), clock(left)
    return f"loss {loss:.4f} {speed} tok/s d_ff {d_ff} kv {n_kv_head} {left} left"


def prune_line(
    step: int, kind: str, before: list, after: list, loss_before: float, loss_after: float
) -> str:
    return (
        f"prune    step {step}: {kind} {one_or_all(before)} -> {one_or_all(after)}, "
        f"loss {loss_before:.4f} -> {loss_after:.4f}"
    )


def diverged(loss: float, norm: float, lr: float, checkpoint: Path) -> str:
    kept = f"; {checkpoint} is untouched" if checkpoint.exists() else ""
    return (
        f"loss {loss}, gradient norm {norm} at learning rate {lr:.2e}: not finite{kept}. Start "
        "again with a lower --learning_rate, a longer --warmup_steps, or --on_nonfinite=skip"
    )


def summary(
    c: Config, plan: Plan, val_loss: float, bits: float, bigram: float | None, seconds: float
) -> str:
    """The table at the end. bits: per byte; bigram: loss of counted token pairs, where known."""
    full, final = plan.shapes[0][0].n_parameters(), plan.shapes[-1][0].n_parameters()
    rows = {
        "parameters": f"{final:,}",
        "FLOPs": f"{plan.flops:.4g}",
        "loss": f"{val_loss:.4f} nats per token on the validation split",
        "bits/byte": f"{bits:.4f}",
        "seconds": f"{seconds:.0f}",
        "sample": f"python -m tools.sample {shlex.quote(c.out_dir)}",
        "picture": f"python -m tools.plot {shlex.quote(c.out_dir)}",
    }
    if plan.schedule.window:
        rows["parameters"] += f", enlarged {full:,}"
        rows["FLOPs"] += f", without pruning {plan.enlarged_flops:.4g}"
    if bigram:
        rows["loss"] += f"; bigram baseline {bigram:.4f}"
    return "\n" + "\n".join(f"{name:<11}{text}" for name, text in rows.items())


def scalars(event: str, line: dict) -> dict[str, float]:
    """The numbers of a line of the log, named `event/key`; of one number per layer, the mean."""
    numbers = {}
    for key, value in line.items():
        several = isinstance(value, list) and all(isinstance(v, (int, float)) for v in value)
        value = mean(value) if several else value
        if isinstance(value, (int, float)):
            numbers[f"{event}/{key}"] = value
    return numbers


def open_mirrors(c: Config, step: int) -> list[Callable[[str, dict], None]]:
    """What shows each line of the log, (event, line), elsewhere too, for a run that goes on after
    `step`. Raises ConfigError for what the package says, as where nobody has logged in.
    """
    mirrors: list[Callable[[str, dict], None]] = []
    key = "tensorboard"
    try:
        if c.tensorboard or c.wandb_project:
            Path(c.out_dir).mkdir(parents=True, exist_ok=True)
        if c.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(c.out_dir, purge_step=step + 1)  # hides what is done again

            def to_tensorboard(event: str, line: dict) -> None:
                with contextlib.suppress(OSError):  # a full disk costs the picture, not the run
                    for name, value in scalars(event, line).items():
                        writer.add_scalar(name, value, line["step"])
                    writer.flush()

            mirrors.append(to_tensorboard)
        key = "wandb_project"
        if c.wandb_project:
            import wandb

            name = Path(c.out_dir).name
            run = wandb.init(project=c.wandb_project, name=name, dir=c.out_dir, config=vars(c))
            mirrors.append(lambda event, line: run.log(scalars(event, line), step=line["step"]))
    except Exception as error:  # whatever the package comes up with
        raise ConfigError(f"{key}={getattr(c, key)!r}: {error}") from error
    return mirrors
