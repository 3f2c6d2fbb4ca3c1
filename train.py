"""Train a GPT that is larger than the one you want, prune it step by step, and let it
recover: one run, one cosine learning-rate schedule (IDEA Prune, arXiv 2503.05920).

On a laptop:         python train.py configs/idea.py
With other knobs:    python train.py configs/idea.py --seed=2 --out_dir=out/second
An eighth as long:   python train.py configs/idea.py --shorter=8
Continue a run:      python train.py out/idea --resume
On eight GPUs:       torchrun --nproc_per_node=8 train.py configs/idea_gpt2.py

The run has three phases. The enlarged model trains, and at the end of that phase every
step also scores its units: neurons, for example. Then a few prunes slice the weakest
units out of the weights and out of the optimizer's moments. Then the small model
recovers. schedule.py says when, and prune.py says which and how.

A run owns its out_dir: config.json, checkpoint.pt, and log.jsonl with its events
(start, step, eval, prune, save, skip and done). Ctrl-C saves, then stops.
"""

import inspect
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

# Set before torch is imported. Threads that wait give up their core sooner, which makes
# steps 3 to 4 times faster when other programs are running.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import configs
from data.command import (
    UserError,
    append_line,
    one_line_errors,
    say,
    write_whole,
)
from data.loader import TokenDataset
from model import (
    GPT,
    KINDS,
    compile_blocks,
    load_checkpoint,
    peak_flops,
    recompute_blocks,
    soft_targets,
    tune_cpu,
)
from prune import Pruner

one_line_errors(
    {
        torch.OutOfMemoryError: "out of memory; try a smaller --micro_batch_size",
        dist.DistError: "another rank is gone; continue with --resume",
    }
)

# --------------------------------------------------------------------------------------
# 1. Config: a file or a run's folder, then the command line. --resume takes the config
# of the checkpoint

if "--help" in sys.argv or "-h" in sys.argv:
    print(f"{__doc__}\nEvery knob, with its default:\n")
    print(inspect.getsource(configs.Config))
    sys.exit()
if len(sys.argv) == 1:
    raise UserError("no config given; try: python train.py configs/idea.py")
config, given = configs.load_config(sys.argv[1], sys.argv[2:])

out_dir = Path(config.out_dir)
checkpoint_path = out_dir / "checkpoint.pt"
checkpoint = None
changes = []  # knobs that the command line changes in a resumed run
if config.resume and checkpoint_path.exists():
    checkpoint = load_checkpoint(checkpoint_path)
    if "config" not in checkpoint:  # from tools.import_hf
        advice = f"start from its weights with --init_from={out_dir}"
        raise UserError(f"{checkpoint_path}: no run to resume; {advice}")
    config, changes = configs.resumed_config(checkpoint["config"], config, given)

# --------------------------------------------------------------------------------------
# 2. Devices and ranks. torchrun starts one process, a rank, per GPU

distributed = "WORLD_SIZE" in os.environ
rank = int(os.environ.get("RANK", 0))
local_rank = int(os.environ.get("LOCAL_RANK", 0))
world_size = int(os.environ.get("WORLD_SIZE", 1))
master = rank == 0  # prints, logs and saves

has_cuda = torch.cuda.is_available() and local_rank < torch.cuda.device_count()
has_mps = torch.backends.mps.is_available() and not distributed
# In bfloat16, attention on MPS sees later tokens (pytorch #195910).
has_mps = has_mps and config.dtype in ("auto", "float32")
available = {"cuda": has_cuda, "mps": has_mps, "cpu": True}
device_type = config.device
if device_type == "auto":
    device_type = next(name for name in available if available[name])
if not available[device_type]:
    raise UserError(f"device={device_type}: not available to this run; try auto")
device = torch.device(device_type)
if device_type == "cuda":
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32

if config.dtype == "auto":
    config.dtype = "float32"
    if device_type == "cuda":
        ampere = torch.cuda.get_device_capability()[0] >= 8
        config.dtype = "bfloat16" if ampere else "float16"
    elif device_type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        config.dtype = "bfloat16"
dtype = getattr(torch, config.dtype)
autocast = torch.autocast(device_type, dtype, enabled=dtype != torch.float32)
# Small gradients would be 0 in float16. The scaler multiplies the loss by a factor, and
# later divides the gradients by it.
scaler = torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)

micro_batch_size, n_micro_batches = configs.split_batch(config, world_size)
if distributed:
    backend = "nccl" if device_type == "cuda" else "gloo"
    timeout = timedelta(minutes=30)  # the other ranks wait while rank 0 saves
    dist.init_process_group(backend, timeout=timeout)

# --------------------------------------------------------------------------------------
# 3. Data. The step and the seed determine a batch, so a checkpoint stores no position

train_data = TokenDataset(config.data_dir, "train", config.context_length)
val_data = TokenDataset(config.data_dir, "val", config.context_length)
tokens_per_step = config.batch_size * config.context_length
# Divide a loss in nats per token by this to get bits per byte of text.
nats_per_bpb = math.log(2) * val_data.bytes_per_target(config.eval_tokens)
if checkpoint and checkpoint["data"] != train_data.digest:
    raise UserError(f"data_dir={config.data_dir}: not the data that {out_dir} has seen")


def get_batch(step):
    """This rank's part of a step's batch: inputs and next tokens, each (B, T)."""
    batch = train_data.batch(step, config.batch_size, config.seed, rank, world_size)
    if device_type == "cuda":  # pinned memory is copied while the GPU computes
        batch = [x.pin_memory() for x in batch]
    return [x.to(device, non_blocking=True) for x in batch]


# --------------------------------------------------------------------------------------
# 4. The model: from this run's checkpoint, from other weights, or from scratch

torch.manual_seed(config.seed)
enlarged = configs.enlarged_shape(config, train_data.vocab_size)  # before any prune


def load_other(knob):
    """The model that a knob names. Its tokens must be those of the data."""
    path = getattr(config, knob)
    other = load_checkpoint(path)
    if other["tokenizer_digest"] != train_data.tokenizer_digest:
        problem = f"its tokenizer is not that of {config.data_dir}"
        raise UserError(f"{knob}={path}: {problem}")
    vocab_size = other["model_config"].vocab_size
    if vocab_size != enlarged.vocab_size:
        problem = f"has {vocab_size} tokens, the data {enlarged.vocab_size}"
        raise UserError(f"{knob}={path}: {problem}; --round_vocab_to adds to these")
    return GPT.from_checkpoint(other, config.context_length).to(device)


flops = 0  # training FLOPs so far
first_step = 1
if checkpoint:
    model = GPT.from_checkpoint(checkpoint).to(device)
    flops = checkpoint["flops"]
    first_step = checkpoint["step"] + 1
    # The config has no knobs for these two. After init_from, they may differ.
    imported = {
        "rope_theta": model.config.rope_theta,
        "norm_eps": model.config.norm_eps,
    }
    enlarged = replace(enlarged, **imported)
elif config.init_from:
    model = load_other("init_from")
    configs.take_shape(config, model.config)
    enlarged = model.config
else:
    model = GPT(enlarged).to(device)

teacher = None
teacher_flops = 0  # per token
if config.teacher:
    teacher = load_other("teacher").eval()
    teacher.requires_grad_(False)  # so autocast does not keep copies of its weights
    teacher_flops = teacher.config.flops_per_token() // 3  # no backward pass

# The plan: how wide is the model in each part of the run, and what will that cost?
schedule = configs.make_schedule(config)
planned_flops = 0
for n_steps, widths in schedule.segments():
    shape = replace(enlarged, **widths)
    segment_flops = shape.flops_per_token() + teacher_flops
    planned_flops += n_steps * tokens_per_step * segment_flops
final = shape
if checkpoint:
    widths = {
        kind: schedule.width(checkpoint["step"], kind) for kind in schedule.widths
    }
    if model.config != replace(enlarged, **widths):
        raise UserError(
            f"{checkpoint_path}: has another shape than the config asks for"
        )

if device_type == "cpu":
    step_flops = (enlarged.flops_per_token() + teacher_flops) * tokens_per_step
    tune_cpu(step_flops)

# --------------------------------------------------------------------------------------
# 5. Optimizer and pruner


def make_optimizers():
    """AdamW, or Muon for the matrices inside the blocks and AdamW for the rest."""
    muon_weights = []
    if config.optimizer == "muon":
        muon_weights = [p for p in model.blocks.parameters() if p.dim() == 2]
    in_muon = set(muon_weights)
    others = [p for p in model.parameters() if p not in in_muon]
    matrices = {"params": [p for p in others if p.dim() == 2]}
    norms = {"params": [p for p in others if p.dim() == 1], "weight_decay": 0.0}
    adamw = torch.optim.AdamW(
        [matrices, norms],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    if not muon_weights:
        return [adamw]
    muon = torch.optim.Muon(
        muon_weights,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",  # so that AdamW's learning rate fits
    )
    return [muon, adamw]


def from_rank_0(mask):
    """Rank 0 decides which units stay, so that every rank slices the same ones."""
    if distributed:
        dist.broadcast(mask, src=0)
    return mask


def optimizer_states():
    """Name of a parameter -> its moments, from the optimizer that trains it."""
    states = {}
    for optimizer in optimizers:
        states |= optimizer.state
    named = model.named_parameters()
    return {name: states[parameter] for name, parameter in named if parameter in states}


def load_optimizer_states(states):
    """The reverse: give each optimizer the moments of its parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = states.get(names[parameter], {})
                for key, value in state.items():
                    # Interned, so that it saves the same bytes as a run without a stop
                    key = sys.intern(key)
                    optimizer.state[parameter][key] = value.to(device)


optimizers = make_optimizers()
kinds = schedule.widths  # the kinds of unit that this run prunes
pruner = Pruner(config.criterion, config.score_beta, kinds, config.seed, from_rank_0)
if checkpoint:
    load_optimizer_states(checkpoint["optimizer"])
    for name, score in checkpoint["scores"].items():
        pruner.scores[name] = score.to(device)
    if scaler.is_enabled() and checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])
checkpoint = None  # free it: it is as large as the model and its moments

# --------------------------------------------------------------------------------------
# 6. Compile, recompute and data parallelism


def empty_pass(model):
    """A dummy forward and backward pass, in which torch compiles and DDP sets up."""
    tokens = torch.zeros(micro_batch_size, config.context_length, dtype=torch.long)
    tokens = tokens.to(device)
    with autocast:
        loss = 0 * model(tokens, tokens)
    loss.backward()


def wrap(model):
    """Under torchrun, DDP averages the gradients of all ranks in the backward pass."""
    if not distributed:
        return model
    model._ddp_params_and_buffers_to_ignore = ["cos", "sin"]
    ddp_model = DDP(model, gradient_as_bucket_view=True)
    # DDP sorts its buckets after its first backward pass. Two empty passes let it do so
    # before a step counts, so that a resumed run adds gradients in the same order.
    for _ in range(2):
        model.zero_grad()
        empty_pass(ddp_model)
    # Zeros instead of None: DDP rounds differently the first time it sees a gradient.
    model.zero_grad(set_to_none=False)
    return ddp_model


if config.recompute != "none":
    recompute_blocks(model, config.recompute)
compiles = config.compile == "on"
if config.compile == "auto" and os.name != "nt":  # Windows seldom has a compiler
    # On a CPU, compiling takes ten seconds and makes a step 1.1 to 1.3 times faster,
    # but slower if KV heads are pruned.
    pays_on_cpu = planned_flops > 3e13 and "n_kv_head" not in kinds
    compiles = device_type == "cuda" or (device_type == "cpu" and pays_on_cpu)
if compiles:
    compile_blocks(model, kinds)
    empty_pass(model)
    model.zero_grad()
    compiles = model.compiled  # false if there is no compiler
ddp_model = wrap(model)

# --------------------------------------------------------------------------------------
# 7. Log, validation, checkpoint

step = first_step - 1  # the last step that is done
log_path = out_dir / "log.jsonl"
wandb = None
if config.wandb_project and master:
    try:
        import wandb
    except ImportError:
        raise UserError("wandb_project: first pip install wandb") from None
seconds_before = 0.0  # of a resumed run, before it was stopped
speed_step = step  # the speed is measured from this step and time
speed_time = time.perf_counter()
DIVERGED = "try a lower --learning_rate, with --resume from the last checkpoint"


def log(event, **values):
    """Add a line to log.jsonl, and send it to Weights & Biases."""
    global speed_step, speed_time
    now = time.perf_counter()
    done = step - 1 if event == "prune" else step
    if event != "step":  # time in validations, saves and prunes is not training
        speed_step = done
        speed_time = now
    line = {"event": event, "step": step, "tokens": done * tokens_per_step}
    line["flops"] = flops
    line["seconds"] = round(seconds_before + now - start_time, 3)
    line |= values
    if master:
        append_line(log_path, json.dumps(line))
    if wandb:
        wandb.log({f"{event}/{key}": value for key, value in line.items()}, step=step)


def log_step():
    """Log the step with the speed since the last one, and show it."""
    global speed_step, speed_time
    now = time.perf_counter()
    tokens_per_second = (step - speed_step) * tokens_per_step / (now - speed_time)
    speed_step = step
    speed_time = now
    values = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
    values["tokens_per_second"] = round(tokens_per_second)
    peak = peak_flops(device)  # of a card that we know
    if peak:  # model FLOPs utilization: the share of the peak
        mfu = flops_per_token * tokens_per_second / world_size / peak
        values["mfu"] = round(mfu, 4)
    values["params"] = model.config.n_params()
    values["phase"] = phase = schedule.phase(step)
    for kind in KINDS:
        values[kind] = getattr(model.config, kind)
    log("step", **values)

    bar.set_postfix_str(f"loss {loss:.4f}, {phase}", refresh=False)
    if bar.disable:  # no terminal shows the bar
        seconds = (planned_flops - flops) / (flops_per_token * tokens_per_second)
        text = (
            f"step {step:6}/{config.max_steps}  loss {loss:.4f}  lr {lr:.1e}  {phase}"
        )
        text += f"  {configs.compact(values['params'])} parameters"
        text += f"  {configs.compact(tokens_per_second)} tok/s"
        say(f"{text}  {tqdm.format_interval(seconds)} left")


@torch.no_grad()
def validate(max_tokens):
    """The mean loss over the first tokens of the val split, in nats per token."""
    model.eval()  # not compiled: the shapes are not those of training
    nats = 0.0
    n_tokens = 0
    for i, batch in enumerate(val_data.in_order(micro_batch_size, max_tokens)):
        if i % world_size == rank:
            inputs, targets = [x.to(device) for x in batch]
            with autocast:
                loss = model(inputs, targets)
            nats += loss.item() * targets.numel()
            n_tokens += targets.numel()
    model.train()
    if distributed:
        total = torch.tensor([nats, n_tokens], dtype=torch.float64, device=device)
        dist.all_reduce(total)
        nats, n_tokens = total.tolist()
    if not math.isfinite(nats):
        raise UserError(f"validation at step {step}: loss {nats}; {DIVERGED}", code=1)
    return nats / n_tokens


def save_checkpoint():
    """Write all that the next step depends on. The same run writes the same bytes."""
    if master:
        # Fresh strings, so that pickle writes the same bytes in a run that was resumed
        knobs = json.loads(json.dumps(asdict(config)))
        for key in configs.ONE_CALL:  # out_dir, resume, ...
            del knobs[key]
        checkpoint = {
            "step": step,
            "flops": flops,
            "config": knobs,
            "model_config": asdict(model.config),
            "data": train_data.digest,
            "tokenizer": train_data.tokenizer,
            "tokenizer_digest": train_data.tokenizer_digest,
            "model": dict(model.state_dict()),
            "optimizer": optimizer_states(),
            "scores": pruner.scores,
            "scaler": scaler.state_dict(),
        }
        write_whole(checkpoint_path, lambda file: torch.save(checkpoint, file))
    log("save")


# --------------------------------------------------------------------------------------
# 8. Start: the first writes to disk

if distributed:  # also waits until every rank has passed its checks
    steps = [None] * world_size
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        problem = f"the ranks continue from steps {steps}"
        raise UserError(f"{problem}; let all of them see the same {out_dir}")
if master:
    lock = configs.open_folder(config)  # held until the process ends
    earlier = []
    if step == 0:
        checkpoint_path.unlink(missing_ok=True)
    else:
        for event in configs.read_log(out_dir):
            # Later steps run again, and so log their events again
            if event["step"] <= step and event["event"] != "done":
                earlier.append(json.dumps(event).encode() + b"\n")
                seconds_before = event["seconds"]
    knobs = json.dumps(asdict(config), indent=1)
    write_whole(out_dir / "config.json", lambda file: file.write(knobs.encode()))
    write_whole(log_path, lambda file: file.writelines(earlier))
    if wandb:
        wandb.init(project=config.wandb_project, name=out_dir.name, config=vars(config))

stop_signal = 0
stop_time = 0.0


def request_stop(number, frame):
    """Save and stop after this step. A second signal ends the process at once."""
    global stop_signal, stop_time
    now = time.monotonic()
    if not stop_signal:
        stop_signal = number
        stop_time = now
    elif now > stop_time + 0.5:  # under torchrun, one Ctrl-C can arrive twice
        os._exit(128 + number)


for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK"):  # USR1: from batch systems
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), request_stop)

threads = torch.get_num_threads()
compute = f"{device_type}, {config.dtype}, {'compiled' if compiles else 'eager'}"
say(configs.describe_run(config, schedule, enlarged, planned_flops, train_data.tokens))
say(f"machine    {compute}, ranks: {world_size}, threads: {threads}")
say(f"output     {out_dir}" + (f", continuing after step {step}" if step else ""))
for change in changes:
    say(f"changed    {change}")
start_time = time.perf_counter()
log(
    "start",
    resumed=step > 0,
    changes=changes,
    planned_flops=planned_flops,
    data=train_data.digest,
    tokenizer=train_data.tokenizer_digest,
    torch=torch.__version__,
    compute=compute,
)

# --------------------------------------------------------------------------------------
# 9. The training loop. Steps count from 1

stop_at = config.stop_after or config.max_steps
val_loss = None
stopping = False
inputs, targets = get_batch(first_step)
bar = tqdm(
    total=config.max_steps,
    initial=step,
    unit="step",
    disable=None if master else True,  # None shows the bar on a terminal only
)
for step in range(first_step, stop_at + 1):
    # Schedule: one cosine over the whole run
    lr = schedule.learning_rate(step)
    if schedule.restarts(step):  # only with lr_restart, the usual pipeline
        optimizers = make_optimizers()
    for optimizer in optimizers:
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr

    # Prune: slice the weakest units out of the weights and the optimizer's moments
    new_widths = schedule.new_widths(step)  # kind of unit -> width; empty in most steps
    if new_widths:
        ddp_model = None  # it would keep the old weights alive
        model.zero_grad()
        loss_before = validate(tokens_per_step)  # few tokens, to be quick
        for kind, width in new_widths.items():
            old_width = getattr(model.config, kind)
            record = pruner.prune(model, optimizers, kind, width)
            loss_after = validate(tokens_per_step)
            record |= {"kind": kind, "width_before": old_width, "width_after": width}
            record |= {"loss_before": loss_before, "loss_after": loss_after}
            log("prune", params=model.config.n_params(), **record)
            losses = f"loss {loss_before:.4f} -> {loss_after:.4f}"
            say(f"prune      step {step}: {kind} {old_width} -> {width}, {losses}")
            loss_before = loss_after
        ddp_model = wrap(model)

    # Forward and backward, one micro-batch at a time
    loss = torch.zeros((), device=device)
    for i in range(n_micro_batches):
        rows = slice(i * micro_batch_size, (i + 1) * micro_batch_size)
        micro_targets = targets[rows]
        if teacher:
            with autocast:
                logits = teacher(inputs[rows])
            micro_targets = soft_targets(logits, micro_targets, config.teacher_weight)
        if distributed:  # average the gradients over the ranks only once per step
            ddp_model.require_backward_grad_sync = i == n_micro_batches - 1
        with autocast:
            micro_loss = ddp_model(inputs[rows], micro_targets) / n_micro_batches
        scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    del micro_loss, micro_targets  # the graph would keep weights alive across a prune
    for optimizer in optimizers:
        # Instead of scaler.step, because we score and clip the true gradients
        scaler.unscale_(optimizer)
    scaler.update()  # the next step's scale: smaller if a gradient overflowed
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    inputs, targets = get_batch(step + 1)  # while the GPU computes

    # Check: means over the ranks. The CPU waits for the GPU here. Gradients that are
    # not finite never reach the weights
    stop = torch.tensor(float(stop_signal > 0), device=device)
    means = torch.stack([loss, norm, stop])
    if distributed:
        dist.all_reduce(means)
        means /= world_size
    loss, grad_norm, stop = means.tolist()
    stopping = stop > 0  # if any rank got a signal, all of them stop after this step
    overflow = scaler.is_enabled() and not math.isfinite(grad_norm)  # of float16
    if not overflow and not math.isfinite(loss + grad_norm):
        problem = f"loss {loss:.3g}, gradient norm {grad_norm:.3g}: not finite"
        raise UserError(f"step {step}: {problem}; {DIVERGED}", code=1)

    # Score: how much does each unit matter? Before clipping. An overflow
    # leaves the scores alone.
    if schedule.scoring(step):
        pruner.score(model)

    # Update
    if config.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
    for optimizer in optimizers:
        if not overflow:
            optimizer.step()
        optimizer.zero_grad(set_to_none=not distributed)  # DDP keeps them in buckets
    flops_per_token = model.config.flops_per_token() + teacher_flops
    flops += flops_per_token * tokens_per_step

    # Log, validate, save, stop
    bar.update()
    is_final_step = step == config.max_steps
    if overflow:
        log("skip", scale=scaler.get_scale())
        say(f"skip       step {step}: a gradient overflows float16")
        if scaler.get_scale() < 1:
            raise UserError(f"step {step}: overflows at any scale; {DIVERGED}", code=1)
    elif step % config.log_every == 0 or is_final_step:
        log_step()
    if step % config.eval_every == 0 or is_final_step:
        val_loss = validate(config.eval_tokens)
        val_bpb = val_loss / nats_per_bpb
        log("eval", val_loss=val_loss, val_bpb=val_bpb)
        losses = f"{val_loss:.4f} nats per token, {val_bpb:.4f} bits per byte"
        say(f"eval       step {step}: {losses}")
    if step % config.save_every == 0 or step == stop_at or stopping:
        save_checkpoint()
    if stopping:
        break

# --------------------------------------------------------------------------------------
# 10. The end

bar.close()
folder = shlex.quote(str(out_dir))
if step < config.max_steps:
    resume = f"python train.py {folder} --resume"
    say(f"stopped after step {step}, saved. Continue with: {resume}")
else:
    if val_loss is None:  # the run was done before, and has been resumed
        val_loss = validate(config.eval_tokens)
    end = {"val_loss": val_loss, "val_bpb": val_loss / nats_per_bpb}
    log("done", **end, params=final.n_params())
    say(f"\nloss       {val_loss:.4f} nats per token on the validation split")
    say(f"seconds    {seconds_before + time.perf_counter() - start_time:.0f}")
    say(f"sample     python -m tools.sample {folder}")
    say(f"picture    python -m tools.plot {folder}")
if wandb:
    wandb.finish()
if distributed:
    dist.barrier()  # wait for rank 0 to save: torchrun ends all if one rank exits
    dist.destroy_process_group()
if stopping:
    sys.exit(128 + (stop_signal or signal.SIGTERM))
