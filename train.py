"""Train a GPT that is larger than the one you want, prune it step by step, and let it recover: in
one run, under one cosine learning-rate schedule.

    python train.py CONFIG [--key=value ...] [--shorter=N]
    torchrun --nproc_per_node=N train.py CONFIG [--key=value ...]

CONFIG is a Python file of assignments, such as configs/idea.py. `train.py out/idea --resume` goes
on with the run in that folder. --shorter=8 makes a run eight times shorter, also what the command
line says of its steps. The method (IDEA Prune, arXiv 2503.05920) is in the loop: schedule, prune,
forward and backward, score, update.
"""

import inspect
import math
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace

from run import machine  # isort: skip  (first: torch, on its import, reads what run/__init__.py sets)

import torch

from data import command
from data.loader import TokenDataset
from data.prepare import prepare_shipped
from model import GPT
from prune import Pruner
from run.checkpoint import load_model, load_optimizers, load_start
from run.config import Config, load_config, micro_batch
from run.cost import Plan
from run.errors import print_error
from run.folder import Folder
from run.optimizer import make_optimizers
from run.ranks import Ranks
from run.report import Report
from run.stop import Stop
from run.teacher import Teacher


def train(c: Config, files: ExitStack) -> int:
    """Run a config, from its start or last checkpoint. In c.out_dir it leaves files, and opens some
    that `files` closes.

    Returns the exit code: 0 when done, 128 + n when signal n stopped the run. Raises DataError or
    UserError.
    """
    device = machine.choose_device(c)
    dtype = machine.choose_dtype(c, device)
    c = replace(c, dtype=str(dtype).removeprefix("torch."))  # it may have been "auto"
    ranks = Ranks(device)

    # Data, and a teacher if there is one
    prepare_shipped(c.data_dir)  # makes the shipped corpus, if that is asked for and missing
    data = TokenDataset(c.data_dir, "train", c.context_length)
    val = TokenDataset(c.data_dir, "val", c.context_length)
    teacher = Teacher(c, data, device) if c.teacher else None

    # Start: from the run's own checkpoint, from other weights, or from new ones
    folder = Folder(c, ranks, data, teacher, files)  # locks out_dir
    if folder.resumes(c):  # --resume, and a checkpoint is there
        c, saved = folder.load(c)
    elif c.init_from:
        c, saved = load_start(c, data.vocab_size)  # weights alone, at step 0; c takes their shape
    else:  # also with --resume, where nothing was saved
        saved = None
    steps_done = saved["step"] if saved else 0
    ranks.check_start(c, steps_done, folder.digests)  # all do the same run; now rank 0 may write

    # Plan: the whole run is known before step 1
    plan = Plan(c, data.vocab_size, teacher.model.config if teacher else None)
    schedule = plan.schedule
    if steps_done == 0:  # later the model may be narrower, and it has fitted before
        machine.check_memory(c, plan, device, ranks.size)

    # Model, optimizers and scores: new, or as saved
    torch.manual_seed(c.seed)
    model = load_model(saved) if saved else GPT(plan.enlarged)
    model.to(device)
    optimizers = make_optimizers(model, c, dtype)
    pruner = Pruner(c.criterion, c.score_beta, schedule.widths, c.seed, ranks.agree)
    if saved:
        load_optimizers(optimizers, model, saved)
        pruner.scores = {name: score.to(device) for name, score in saved["scores"].items()}
    del saved  # as large as the model and its moments
    compiled = machine.choose_compile(c, device, plan)
    if compiled:
        machine.compile_blocks(model, schedule.widths)
    if c.recompute:
        machine.recompute_blocks(model)
    micro_batch_size = micro_batch(c, ranks.size)

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def pass_of_nothing(forward: torch.nn.Module) -> None:
        """One pass with all gradients 0, at the start and after each prune: torch.compile compiles
        in it, and DDP orders its buckets."""
        tokens = torch.zeros(micro_batch_size, c.context_length, dtype=torch.long, device=device)
        with autocast():
            loss = forward(tokens, tokens)
        (0 * loss).backward()

    # Compiles here; False if that fails on any rank
    compiled = compiled and machine.keep_compiled(model, pass_of_nothing, ranks)
    forward = ranks.wrap(model, pass_of_nothing)  # for training: DDP, where there are several ranks

    @torch.no_grad()
    def validate(max_tokens: int) -> float:
        """Mean loss, in nats per token, over the first `max_tokens` tokens of the split."""
        model.eval()
        losses = []  # of a batch, and how many tokens it has
        for i, (x, y) in enumerate(val.in_order(micro_batch_size, max_tokens)):
            if i % ranks.size == ranks.rank:  # the ranks share the batches out
                with autocast():
                    loss = model(machine.send(x, device), machine.send(y, device))
                losses.append((loss, y.numel()))
        model.train()
        nats, tokens = sum(loss.item() * n for loss, n in losses), sum(n for _, n in losses)
        nats, tokens = ranks.mean(torch.tensor([nats, tokens], dtype=torch.float64)).tolist()
        return nats / tokens

    stop = Stop()  # before, a signal ends the process at once: there is nothing to save
    report = Report(c, plan, val, folder, steps_done)
    folder.open_log(c, steps_done)  # a new run removes the files of an old one
    report.print_plan(steps_done, data, machine.describe(device, ranks.size, c.dtype, compiled))

    # The loop. Steps count from 1
    step = steps_done  # of a run that resumes after its last step, which has no loop
    last = c.stop_after or c.max_steps
    val_loss, stopping = None, 0.0
    for step in range(steps_done + 1, last + 1):
        # Schedule: one cosine over the whole run
        lr = schedule.learning_rate(step)
        if schedule.restarts(step):  # only with lr_restart: a fresh optimizer, a second cosine
            optimizers = make_optimizers(model, c, dtype)
        for optimizer in optimizers:
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr

        # Prune: slice the weakest units out of the weights and out of the moments
        new_widths = schedule.new_widths(step)  # by kind of unit; {} on most steps
        if new_widths:
            before = validate(plan.tokens_per_step)  # few tokens: they show what a prune costs
            for kind, width in new_widths.items():
                record = pruner.prune(model, optimizers, kind, width)
                after = validate(plan.tokens_per_step)
                report.prune(step, kind, before, after, record)
                before = after
            del forward  # under torchrun, DDP with the old parameters and their gradients
            forward = ranks.wrap(model, pass_of_nothing)

        # Forward and backward: the gradient of the mean loss over micro-batches and ranks
        batch = data.batch(step, c.batch_size, c.seed, ranks.rank, ranks.size)
        x, y = (machine.send(tokens, device) for tokens in batch)  # tokens, next tokens
        micro_batches = list(zip(x.split(micro_batch_size), y.split(micro_batch_size)))
        loss = torch.zeros((), device=device)
        for i, (inputs, targets) in enumerate(micro_batches, 1):
            forward.require_backward_grad_sync = i == len(
                micro_batches
            )  # DDP, if there, averages then
            with autocast():
                if teacher:
                    targets = teacher.targets(inputs, targets)
                micro_loss = forward(inputs, targets) / len(micro_batches)
            micro_loss.backward()
            loss += micro_loss.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])

        # Check: only finite gradients may reach the weights. `stopping` is above 0 if any rank got
        # a signal: then all stop. Here the CPU waits for the GPU
        loss, grad_norm, stopping = ranks.means(loss, norm, float(stop.signal > 0))
        if not math.isfinite(loss + grad_norm):
            raise report.diverged(step, loss, grad_norm, lr)

        # Score: how much does each unit matter? Before the gradients are clipped
        if schedule.scoring(step):
            pruner.score(model)

        # Update
        if c.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), c.grad_clip, norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=not ranks.launched)  # DDP keeps their memory

        # Log, validate, save, stop
        if step % c.log_every == 0 or step == c.max_steps:
            report.step(step, model.config, loss, lr, grad_norm)
        if step % c.eval_every == 0 or step == c.max_steps:
            val_loss = validate(c.eval_tokens)
            report.eval(step, val_loss)
        must_save = step == last or bool(stopping)
        if step % c.save_every == 0 or must_save:
            report.save_checkpoint(step, model, optimizers, pruner.scores, must_save)
        if stopping:
            break

    if step < c.max_steps:
        report.stopped(step)
        number = stop.signal or signal.SIGTERM  # SIGTERM, where another rank got the signal
        return 128 + number if stopping else 0
    if val_loss is None:  # resumed after the last step
        val_loss = validate(c.eval_tokens)
    report.done(step, val_loss)
    return 0


@command
def main(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        print("\nEvery knob, its type, its default and its consequence:\n")
        print(inspect.getsource(Config).partition("\n")[2])  # the knobs with their comments
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
