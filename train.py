"""Train a GPT that is larger than the one you want, prune it step by step, and let it recover: in
one run, under one cosine learning-rate schedule.

    python train.py CONFIG [--key=value ...] [--shorter=N]
    torchrun --nproc_per_node=N train.py CONFIG [--key=value ...]

CONFIG is a Python file of assignments, such as configs/idea.py. `train.py out/idea --resume` goes
on with the run in that folder. --shorter=8 divides all counts of steps by eight, but not
--stop_after; --log_every falls just far enough for 20 lines of log. The method (IDEA Prune, arXiv
2503.05920) is in the loop: schedule, prune, forward and backward, score, update.
"""

import inspect
import math
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace

# torch reads it at its import: threads that wait leave the core soon, which made steps three to
# four times as fast beside other programs
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import torch
from torch import Tensor

from data.command import command
from data.loader import TokenDataset
from model import GPT
from prune import Optimizers, Pruner
from run.checkpoint import load_history, load_init_from, load_model
from run.config import Config, load_config
from run.cost import Plan
from run.forward import Forward
from run.machine import Machine, Stop, check_finite, check_memory, print_error
from run.optimizer import make_optimizers
from run.out_dir import OutDir
from run.teacher import Teacher


def forward_and_backward(
    forward: Forward,
    optimizers: Optimizers,
    tokens: Tensor,
    targets: Tensor,
    teacher: Teacher | None,
) -> Tensor:
    """Leave in p.grad the gradient of the mean loss over micro batches and ranks. It is a function
    of its own so that the last graph, which holds the weights, is freed before a prune.

    tokens, targets: (B, T), this rank's part of the batch. Returns its mean loss, a float32 scalar.
    """
    size, scaler = forward.micro_batch_size, forward.machine.scaler  # it works in float16 only
    micro_batches = list(zip(tokens.split(size), targets.split(size)))
    loss = torch.zeros((), device=tokens.device)
    for i, (inputs, wanted) in enumerate(micro_batches, 1):
        if teacher:
            wanted = teacher.targets(inputs, wanted)
        with forward.averaging(i == len(micro_batches)):  # under torchrun: only in the last one
            micro_loss = forward(inputs, wanted) / len(micro_batches)
            scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    scaler.update()  # the scale of the next step: lower, where a gradient is not finite
    return loss


@torch.no_grad()
def validate(forward: Forward, val: TokenDataset, max_tokens: int) -> float:
    """Mean loss, in nats per token, over the first `max_tokens` tokens of the split."""
    model, machine = forward.model, forward.machine
    model.eval()  # no layer asks, but Forward does: compiled blocks are for shapes of training
    losses = []  # (mean loss of a batch, its tokens)
    for i, (x, y) in enumerate(val.in_order(forward.micro_batch_size, max_tokens)):
        if i % machine.ranks == machine.rank:  # the ranks share the batches out
            with machine.autocast():
                loss = model(machine.send(x), machine.send(y))
            losses.append((loss, y.numel()))
    model.train()
    nats, tokens = sum(loss.item() * n for loss, n in losses), sum(n for _, n in losses)
    nats, tokens = machine.average(torch.tensor([nats, tokens], dtype=torch.float64)).tolist()
    check_finite("validation", loss=nats / tokens)  # an update may have broken the weights
    return nats / tokens


def train(c: Config, files: ExitStack) -> int:
    """Run a config, from the start or from its last checkpoint. Its files are in its out_dir;
    `files` closes those that are open.

    A batch is (inputs, targets), each int64 (B, T): tokens, and the tokens that follow. It depends
    on step, seed and sizes alone, so a checkpoint stores no place in the data. A checkpoint's keys:
    `format`, `step`, `config`, `model_config` (the shape at that step), digests, `model` (weights)
    and `optimizer` (moments) by name of parameter, `scores` by name of UnitGroup, and in float16
    `scaler`, the scale of gradients.

    Returns the exit code: 0 when done or after stop_after, 128 + n when signal n stopped the run.
    Raises UserError or OSError.
    """
    # Data, and a teacher if there is one
    machine = Machine(c)  # device, precision and ranks
    c = replace(c, dtype=machine.dtype_name)  # what "auto" stands for here: a resume compares it
    data = TokenDataset(c.data_dir, "train", c.context_length)
    val = TokenDataset(c.data_dir, "val", c.context_length)
    teacher = Teacher(c, data, machine) if c.teacher else None

    # Start: anew, from the run's own checkpoint, or from other weights
    out = OutDir(c, machine, data, teacher, files)  # locks it; refuses another run's
    saved = None
    if c.resume and out.has_checkpoint:
        c, saved = out.load_checkpoint(c)  # refuses another config; saved may be pruned already
    elif c.init_from:
        c, saved = load_init_from(c, data, machine)  # at step 0; c gets the shape of these weights
    steps_done = out.check_start(c, saved)  # waits for all ranks; now rank 0 may write

    # Model, optimizers and scores: new, or as saved. The plan of the whole run comes first
    plan = Plan(c, data.vocab_size, teacher.model.config if teacher else None)
    schedule = plan.schedule
    machine.choose_threads(plan.flops(1))
    check_memory(c, plan, steps_done + 1, machine)
    torch.manual_seed(c.seed)
    model = load_model(saved, machine.device) if saved else GPT(plan.enlarged).to(machine.device)
    optimizers = make_optimizers(model, c)
    pruner = Pruner(c.criterion, c.score_beta, set(schedule.widths), c.seed, machine.from_rank_0)
    if saved:
        load_history(saved, model, optimizers, pruner, machine.scaler)  # empty with init_from
    del saved  # as large as the model and its moments
    forward = Forward(model, c, plan, machine)  # compiles; under torchrun, wraps in DDP
    stop = Stop()  # up to here a signal ends the process at once: there is nothing to save
    log = out.begin(c, plan, val, steps_done, forward.compiled)  # prints the plan

    def get_batch(step: int) -> tuple[Tensor, Tensor]:  # this rank's part
        return data.batch(step, c.batch_size, c.seed, machine.rank, machine.ranks)

    # The loop. Steps count from 1
    step, last = steps_done, c.stop_after or c.max_steps  # last: the last one to do
    val_loss, stopping = None, False
    batch = get_batch(step + 1)
    for step in range(steps_done + 1, last + 1):
        # Schedule: one cosine over the whole run
        lr = schedule.learning_rate(step)
        if schedule.restarts(step):  # only with lr_restart: a fresh optimizer, a second cosine
            optimizers = make_optimizers(model, c)
        for param_group in [group for o in optimizers for group in o.param_groups]:
            param_group["lr"] = lr

        # Prune: slice the weakest units out of the weights and out of the moments
        if new_widths := schedule.new_widths(step):  # by kind of unit; {} on most steps
            with forward.unwrapped():  # DDP would keep what is cut
                before = validate(forward, val, plan.tokens_per_step)  # of few tokens, to be quick
                for kind, width in new_widths.items():
                    record = pruner.prune(model, optimizers, kind, width)
                    after = validate(forward, val, plan.tokens_per_step)
                    log.log_prune(step, model.config, kind, before, after, record)
                    before = after

        # Forward and backward
        tokens, targets = (machine.send(x) for x in batch)  # targets: the next tokens
        loss = forward_and_backward(forward, optimizers, tokens, targets, teacher)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        batch = get_batch(step + 1)  # while the GPU computes

        # Check: only finite gradients reach the weights. For these floats the CPU awaits the GPU
        loss, grad_norm, stop_share = machine.average_numbers(loss, norm, float(stop.signal > 0))
        stopping = stop_share > 0  # of the ranks: where one got a signal, all stop after this step
        skip = machine.scaler.is_enabled() and not math.isfinite(grad_norm)
        if not skip:  # in float16, gradients may overflow: such a step changes nothing
            check_finite(f"step {step}", loss=loss, gradient_norm=grad_norm, learning_rate=lr)

        # Score: how much does each unit matter? Before the gradients are clipped
        if schedule.scoring(step):
            pruner.score(model)

        # Update
        if c.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), c.grad_clip, norm)
        for optimizer in optimizers:
            if not skip:
                optimizer.step()
            optimizer.zero_grad(set_to_none=not machine.launched)  # DDP keeps them in its buckets

        # Log, validate, save, stop
        if skip:
            log.log_skip(step)
        elif step % c.log_every == 0 or step == c.max_steps:
            log.log_step(step, model.config, loss, lr, grad_norm)
        if step % c.eval_every == 0 or step == c.max_steps:
            val_loss = validate(forward, val, c.eval_tokens)
            log.log_eval(step, val_loss)
        if step % c.save_every == 0 or step == last or stopping:
            out.save_checkpoint(step, model, optimizers, pruner.scores)
        if stopping:
            break

    machine.average_numbers(0.0)  # waits for rank 0's save: torchrun ends all with the first rank
    if step < c.max_steps:
        log.print_stop(step)
        number = stop.signal or signal.SIGTERM  # SIGTERM, where another rank got the signal
        return 128 + number if stopping else 0
    if val_loss is None:  # resumed when done; data_dir may have moved, so save it anew
        val_loss = validate(forward, val, c.eval_tokens)
        out.save_checkpoint(step, model, optimizers, pruner.scores)
    log.log_done(step, val_loss)
    return 0


@command
def main(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        print("\nEvery knob, its type, its default and what it does. A config replaces defaults.\n")
        print(inspect.getsource(Config).partition("\n")[2])  # the knobs with their comments
        if not argv:
            print("error: no CONFIG, such as configs/idea.py", file=sys.stderr)
        return 0 if argv else 2
    c = None
    try:
        c = load_config(argv[0], argv[1:])
        with ExitStack() as files:
            return train(c, files)
    except Exception as error:
        return print_error(error, c)  # raises it again if it is a bug
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
