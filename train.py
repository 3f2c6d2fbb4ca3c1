"""Train an enlarged GPT, prune it step by step and let it recover, in one run, under one cosine.

    python train.py CONFIG [--key=value ...] [--shorter=N]
    torchrun --nproc_per_node=N train.py CONFIG [--key=value ...]

CONFIG is a Python file of assignments, such as configs/idea.py, or the folder of a run, such as
out/idea, to go on with --resume; every knob is in config.py. --shorter=8 makes a run of an eighth
of the steps to look at. The method (IDEA Prune, arXiv 2503.05920) is in the loop: schedule, prune,
forward and backward, score, update.
"""

import contextlib
import dataclasses
import inspect
import math
import os
import shlex
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import DataError
from data.loader import TokenDataset, bigram_loss
from data.prepare import prepare_shipped
from model import GPT
from prune import prune, update_scores, watch_inputs
from run.checkpoint import (
    CheckpointError,
    check_finite,
    check_same_run,
    find_checkpoint,
    load_checkpoint,
    load_model,
    load_optimizer,
    open_out_dir,
    save_checkpoint,
)
from run.config import (
    SHAPE,
    Config,
    ConfigError,
    check_memory,
    check_ranks,
    load_config,
    lowest_width,
    make_plan,
    match_flops,
    model_config,
    padded_vocab,
    prune_targets,
    take_shape,
)
from run.llama import load_folder
from run.machine import (
    Ranks,
    Stop,
    TrainingError,
    another_rank_died,
    choose_compile,
    choose_device,
    choose_dtype,
    device_memory,
    explain_memory,
    keep_memory,
)
from run.report import (
    describe,
    diverged,
    one_or_all,
    open_mirrors,
    prune_line,
    step_line,
    summary,
)

# --------------------------------------------------------------------------------------------------
# Parts of the loop
# --------------------------------------------------------------------------------------------------


def wrap(model: GPT, compiled: bool, ranks: Ranks) -> nn.Module:
    """The model as the loop calls it, made anew whenever its shapes change; its gradients, views of
    the last wrapper's buckets, go.

    After a few recompilations torch falls back to eager without a word; the reset drops the graphs
    of the shapes that are gone, and the count with them.
    """
    model.zero_grad(set_to_none=True)
    forward = model
    if compiled:
        torch._dynamo.reset()
        forward = torch.compile(model)
    if ranks.size > 1:
        with warnings.catch_warnings():  # newer torch has another word for broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            forward = DistributedDataParallel(
                forward, gradient_as_bucket_view=True, broadcast_buffers=False
            )
    return forward


def make_optimizer(model: GPT, c: Config, names: set[str]) -> torch.optim.AdamW:
    """AdamW for the parameters of these names: all of them, or this rank's share."""
    mine = [p for name, p in model.named_parameters() if name in names]
    groups = [
        {"params": [p for p in mine if p.dim() >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in mine if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=True)


@torch.no_grad()
def evaluate(
    model: GPT, data: TokenDataset, max_tokens: int, batch_size: int, autocast, ranks: Ranks
) -> float:
    """Mean loss in nats per token over the first `max_tokens` tokens of the split, shared by ranks.

    It runs the model itself, not the compiled one, which a last batch of another shape would
    recompile.
    """
    device = model.embed.weight.device
    total = torch.zeros(2, dtype=torch.float64)  # nats, tokens
    model.eval()
    for i, (x, y) in enumerate(data.in_order(batch_size, max_tokens)):
        if i % ranks.size == ranks.rank:
            with autocast():
                loss = model(x.to(device), y.to(device))
            total += torch.tensor([loss.item() * y.numel(), y.numel()], dtype=torch.float64)
    model.train()
    nats, tokens = ranks.mean(total.to(device) if ranks.size > 1 else total).tolist()
    return nats / tokens


OVERFLOW = "the gradients overflow float16; use --dtype=bfloat16 or float32"


# --------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------


def train(c: Config, stop: Stop) -> int:
    """Run a config from its first or its last saved step to the end; its files are in c.out_dir.

    Returns the exit code: 0 when done, 128 + the signal's number when one stopped it. Raises
    ConfigError, DataError or CheckpointError before anything is written, TrainingError later on.
    """
    started = time.perf_counter()
    keep_memory()
    device = choose_device(c)
    ranks = Ranks(device, c.rank_timeout)
    stop.listen()
    is_main = ranks.rank == 0  # the one that speaks, logs and saves
    folder = Path(c.out_dir)

    # ---- Data

    if c.data_dir == Config.data_dir and not Path(c.data_dir).exists():
        prepare_shipped(c.data_dir)
    data = TokenDataset(c.data_dir, "train", c.context_length)
    val = TokenDataset(c.data_dir, "val", c.context_length)
    tokens_per_step = c.batch_size * c.context_length
    micro_batch = c.micro_batch_size or c.batch_size // ranks.size

    # ---- Plan: the whole run is known before step 1

    vocab_size = padded_vocab(c, data.vocab_size)
    state = find_checkpoint(c)  # to resume from, if any
    source = state
    if c.init_from and not state:
        initial = Path(c.init_from)
        source = load_folder(initial) if initial.is_dir() else load_checkpoint(initial)
        check_finite(source, initial)
    if c.init_from and state:  # the shape that it gave then; the checkpoint may be narrower by now
        c = dataclasses.replace(c, **{key: state["config"][key] for key in SHAPE})
    elif c.init_from:
        c = take_shape(c, source, data.vocab_size)
    if not state:  # what has run may be narrower by now
        check_memory(c, vocab_size, device_memory(device))
    c = match_flops(c, vocab_size)
    dtype = choose_dtype(c, device)
    c = dataclasses.replace(c, dtype=str(dtype).removeprefix("torch."))
    if c.shard_optimizer and dtype == torch.float16:
        raise ConfigError("shard_optimizer=True: needs dtype=bfloat16 or float32")
    plan = make_plan(c, vocab_size)
    schedule, targets = plan.schedule, prune_targets(c)
    compiled = choose_compile(c, device, plan.flops / len(plan.shapes))

    # ---- Model and optimizer, fresh or from the checkpoint

    if state:
        check_same_run(c, state)
    ranks.wait()  # all have looked at out_dir before the first one writes there
    torch.manual_seed(c.seed)
    model = load_model(source) if source else GPT(model_config(c, vocab_size))
    del source  # as large as the model again
    model.to(device)
    model.recompute = c.recompute
    shard = c.shard_optimizer and ranks.size > 1
    owner = ranks.owners(model, shard)  # parameter name -> the rank that updates it
    mine = {name for name, rank in owner.items() if rank == ranks.rank}
    optimizer = make_optimizer(model, c, mine)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    scores: dict[str, Tensor] = {}  # group name -> smoothed score of each unit
    step = tokens = flops = skipped = 0
    if state:
        step, tokens, flops = state["step"], state["tokens"], state["flops"]
        skipped = state["skipped"]
        load_optimizer(optimizer, model, state)
        scaler.load_state_dict(state["scaler"])
        scores = {name: score.to(device) for name, score in state["scores"].items()}
    found = state["path"] if state else None  # the file that the run goes on from
    del state
    if not ranks.alike(torch.tensor([step, c.max_steps], device=device)):
        way = "give all of them one out_dir, on a disk that they share"
        raise TrainingError(f"this rank starts after step {step}, another elsewhere; {way}")

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def validate(max_tokens: int) -> float:
        return evaluate(model, val, max_tokens, micro_batch, autocast, ranks)

    def bits_per_byte(nats_per_token: float) -> float:
        return nats_per_token / math.log(2) / val.bytes_per_token

    # ---- Output

    if is_main:
        mirrors = open_mirrors(c, step)
        log = open_out_dir(c, step, found)
    on_terminal = is_main and sys.stderr.isatty() and sys.stdout.isatty()
    bar_format = "{n_fmt}/{total_fmt} {desc} |{bar}|"  # our time left knows the prunes to come
    bar = tqdm(total=c.max_steps, initial=step, disable=not on_terminal, bar_format=bar_format)
    say = bar.write if is_main else lambda text: None

    def write(event: str, **values) -> None:
        if is_main:
            seconds = round(log.seconds + time.perf_counter() - started, 3)
            line = {"step": step, "tokens": tokens, "flops": flops, "seconds": seconds} | values
            log.write(event, **line)
            for mirror in mirrors:
                mirror(event, line)

    def save(last: bool) -> None:
        """A failed save costs the run nothing but the last one: it goes on, and tries again."""
        progress = {"step": step, "tokens": tokens, "flops": flops, "skipped": skipped}
        path = folder / "checkpoint.pt"
        moments = ranks.gather_moments(model, optimizer, owner, shard)
        try:
            if is_main:
                save_checkpoint(path, c, model, moments, scaler, scores, progress)
            write("save")
        except OSError as error:
            write("save", error=str(error))
            message = f"step {step}: cannot save {path}: {error}; what was saved before is whole"
            if last:
                raise TrainingError(message) from error
            say(f"save     {message}; trying again at the next save")

    machine = f"{device.type}, ranks: {ranks.size}, CPU threads: {torch.get_num_threads()}, "
    machine += f"{c.dtype}, {'compiled' if compiled else 'eager'}"
    say(describe(c, plan, data, val, machine))
    say(f"output   {folder}" + (f", going on from step {step}" if found else ""))
    write("start", resumed=found is not None, planned_flops=plan.flops)

    # ---- Loop

    shape = model.shape()
    forward = None  # the model, compiled and wrapped for DDP as the run needs it
    inputs, hooks = {}, []  # what the activation criterion watches
    val_loss, trained_tokens, trained_seconds, skipped_in_a_row = None, 0, 0.0, 0
    last_step, signalled = c.stop_after or c.max_steps, 0.0
    while step < last_step:
        step += 1
        began = time.perf_counter()

        # Schedule: one cosine over the whole run. Naive pipeline: a second one, no moments
        lr = schedule.learning_rate(step)
        if c.lr_restart and step == schedule.window[0]:
            optimizer = make_optimizer(model, c, mine)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Prune: where the schedule's width falls, cut the weakest units out of weights and moments
        for kind, (full, target, grid) in targets.items():
            width, before = schedule.width(step, full, target, grid), getattr(shape, kind)
            if width * c.n_layer == sum(before):
                continue
            if not scores:
                raise TrainingError(f"step {step}: no step was finite enough to score: {OVERFLOW}")
            floor = lowest_width(c, target, grid)
            loss_before = validate(tokens_per_step)
            how = (c.scope, grid, floor, ranks.from_first)
            cuts = prune(model, optimizer, scores, kind, width, *how)
            ranks.check_weights(model, step)
            loss_after = validate(tokens_per_step)
            shape, forward = model.shape(), None
            after = getattr(shape, kind)
            write(
                "prune",
                group=kind,
                width_before=one_or_all(before),
                width_after=one_or_all(after),
                loss_before=loss_before,
                loss_after=loss_after,
                **cuts,
            )
            say(prune_line(step, kind, before, after, loss_before, loss_after))
        scoring = schedule.scoring(step)
        groups = [g for g in model.groups() if g.kind in targets] if scoring else []
        watching = scoring and c.criterion == "activation"
        if forward is None or watching != bool(hooks):
            for hook in hooks:
                hook.remove()
            inputs, hooks = watch_inputs(model, groups) if watching else ({}, [])
            forward = wrap(model, compiled, ranks)

        # Forward and backward: the gradient of the mean over micro-batches and ranks
        batch = data.batch(step, c.batch_size, c.seed, ranks.rank, ranks.size)
        micro_batches = list(zip(*(tokens.to(device).split(micro_batch) for tokens in batch)))
        loss = torch.zeros((), device=device)
        with explain_memory(micro_batch, c.batch_size // ranks.size):
            if ranks.size > 1 and len(micro_batches) > 1 and model.embed.weight.grad is None:
                # Gradients become views of DDP's buckets only where they are averaged. Once for
                # nothing, lest they accumulate beside the buckets, twice in memory
                with autocast():
                    forward(*micro_batches[0]).backward()
                model.zero_grad(set_to_none=False)
                for total in inputs.values():
                    total.zero_()
            for i, (x, y) in enumerate(micro_batches, start=1):
                waits = ranks.size > 1 and i < len(micro_batches)  # average once, at the last one
                with forward.no_sync() if waits else contextlib.nullcontext():
                    with autocast():
                        micro_loss = forward(x, y) / len(micro_batches)
                    scaler.scale(micro_loss).backward()
                loss += micro_loss.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        signalled = torch.tensor(float(stop.signal), device=device)
        # The one wait for the device in a step: nothing that is not finite may enter the weights
        loss, grad_norm, signalled = ranks.mean(torch.stack([loss, norm, signalled])).tolist()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
        skipped += not finite
        overflow = scaler.is_enabled() and math.isfinite(loss)  # at home in float16, now and then
        may_skip = overflow or c.on_nonfinite == "skip"
        if not finite and (not may_skip or skipped_in_a_row > 50):
            why = OVERFLOW if overflow else diverged(loss, grad_norm, lr, folder / "checkpoint.pt")
            raise TrainingError(f"step {step}: {why}")

        # Score: how much would the loss change without each unit? Before clipping
        if scoring and finite:
            seen = tokens_per_step // ranks.size * (2 if c.recompute else 1)
            for total in inputs.values():
                ranks.mean(total.div_(seen))
            generator = torch.Generator().manual_seed((c.seed * 1_000_003 + step) % 2**63)
            update_scores(scores, model, groups, c.criterion, c.score_beta, inputs, generator)
        for total in inputs.values():
            total.zero_()

        # Update
        if c.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), c.grad_clip, norm)
        if finite or scaler.is_enabled():  # the scaler looks for itself, and scales down
            scaler.step(optimizer)
            scaler.update()
            if shard:
                ranks.share_weights(model, owner)
        model.zero_grad(set_to_none=ranks.size == 1)  # views of buckets stay
        tokens += tokens_per_step
        flops += tokens_per_step * shape.flops_per_token()

        # Log, validate, save, stop
        trained_tokens += tokens_per_step
        trained_seconds += time.perf_counter() - began
        if step % c.log_every == 0 or step == c.max_steps:
            speed = trained_tokens / trained_seconds  # tokens per second
            trained_tokens, trained_seconds = 0, 0.0
            write(
                "step",
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                tokens_per_second=round(speed),
                params=shape.n_parameters(),
                d_ff=one_or_all(shape.d_ff),
                n_kv_head=one_or_all(shape.n_kv_head),
                phase=schedule.phase(step),
                skipped=skipped,
            )
            left = (plan.flops - flops) / (shape.flops_per_token() * speed)  # seconds
            line = step_line(loss, speed, shape, left)
            bar.set_description_str(line, refresh=False)
            if not on_terminal:
                say(f"step {step:6}/{c.max_steps}  {line} lr {lr:.1e} {schedule.phase(step)}")
        bar.update()
        if step % c.eval_every == 0 or step == c.max_steps:
            val_loss = validate(c.eval_tokens)
            bits = bits_per_byte(val_loss)
            write("eval", val_loss=val_loss, val_bpb=bits)
            say(f"eval     step {step}: {val_loss:.4f} nats per token, {bits:.4f} bits per byte")
        if step % c.save_every == 0 or step == last_step or signalled:
            save(last=step == last_step or bool(signalled))
        if signalled:
            break
    bar.close()
    if step < c.max_steps:
        way = f"python train.py {shlex.quote(str(folder))} --resume"
        say(f"stopped after step {step}, saved in {folder}; {way} goes on")
        return 128 + (stop.signal or signal.SIGTERM) if signalled else 0

    # ---- Done

    if val_loss is None:  # resumed after its last step
        val_loss = validate(c.eval_tokens)
    bits = bits_per_byte(val_loss)
    write("done", val_loss=val_loss, val_bpb=bits, params=shape.n_parameters())
    if is_main:
        seconds = log.seconds + time.perf_counter() - started
        say(summary(c, plan, val_loss, bits, bigram_loss(data, val), seconds))
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        print("\nEvery knob, its type, its default and its consequence:\n")
        print(inspect.getsource(Config).partition("\n")[2])
        return 0 if argv else 2
    rank, started = int(os.environ.get("RANK", 0)), False
    try:
        with Stop() as stop:
            c = load_config(argv[0], argv[1:])
            check_ranks(c, int(os.environ.get("WORLD_SIZE", 1)))
            started = True
            return train(c, stop)
    except (ConfigError, DataError, CheckpointError, TrainingError, OSError) as error:
        if rank == 0 or started:  # what is wrong before is wrong on every rank
            line = " ".join(str(error).split())
            print(f"{f'rank {rank}: ' if rank else ''}error: {line}", file=sys.stderr)
        return 1 if isinstance(error, (TrainingError, OSError)) else 2
    except KeyboardInterrupt:  # before the run listens
        return 128 + signal.SIGINT
    except RuntimeError as error:
        if not another_rank_died(error):
            raise
        way = f"--resume goes on from the last checkpoint ({str(error).splitlines()[0]})"
        print(f"rank {rank}: error: another rank no longer answers; {way}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
