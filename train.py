"""Train a GPT that is larger than the one you want, prune it step by step, and let it
recover: one run, one cosine learning-rate schedule (IDEA Prune, arXiv 2503.05920).

On a laptop:         python train.py configs/idea.py
With other knobs:    python train.py configs/idea.py --seed=2 --out_dir=out/second
An eighth as long:   python train.py configs/idea.py --shorter=8
Continue a run:      python train.py out/idea --resume
On eight GPUs:       torchrun --nproc_per_node=8 train.py configs/idea_gpt2.py

A run owns its out_dir: config.json, log.jsonl and checkpoint.pt. Ctrl-C saves, then
stops.
"""

import ctypes
import inspect
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

# Set before torch is imported. Idle threads give up their core sooner, which makes
# steps 3 to 4 times faster when other programs are running.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from configs import (
    Config,
    compact,
    describe_run,
    enlarged_shape,
    load_config,
    make_schedule,
    resumed_config,
    split_batch,
    take_shape,
)
from data.command import UserError, drop_output, one_line_errors
from data.loader import TokenDataset
from model import GPT, compile_blocks, load_checkpoint, peak_flops, recompute_blocks
from prune import Pruner

one_line_errors(
    {
        torch.OutOfMemoryError: "out of memory; try a smaller --micro_batch_size",
        dist.DistError: "another rank is gone; continue with --resume",
    }
)

# --------------------------------------------------------------------------------------
# 1. Config: a file, then the command line. A run that continues has the config it began
# with

if {"-h", "--help"} & set(sys.argv):
    print(__doc__)
    print("Every knob, with its default:\n")
    print(inspect.getsource(Config).partition("\n")[2])
    sys.exit()
if len(sys.argv) < 2:
    raise UserError("no config given; try: python train.py configs/idea.py")
config, given = load_config(sys.argv[1], sys.argv[2:])

out_dir = Path(config.out_dir)
checkpoint_path = out_dir / "checkpoint.pt"
checkpoint = None
changes = []
if config.resume and checkpoint_path.exists():
    checkpoint = load_checkpoint(checkpoint_path)
    config, changes = resumed_config(checkpoint["config"], config, given)

# --------------------------------------------------------------------------------------
# 2. Devices and ranks. torchrun starts one process, a rank, per GPU

distributed = "WORLD_SIZE" in os.environ
rank = int(os.environ.get("RANK", 0))
local_rank = int(os.environ.get("LOCAL_RANK", 0))
world_size = int(os.environ.get("WORLD_SIZE", 1))
master = rank == 0  # prints, logs and saves

available = ["cpu"]
if torch.backends.mps.is_available() and not distributed:
    # Only float32, because bfloat16 attention on MPS sees later tokens (pytorch
    # #195910)
    if config.dtype in ("auto", "float32"):
        available.insert(0, "mps")
if torch.cuda.is_available() and local_rank < torch.cuda.device_count():
    available.insert(0, "cuda")
device_type = available[0] if config.device == "auto" else config.device
if device_type not in available:
    raise UserError(f"device={device_type}: this run can have {', '.join(available)}")
device = torch.device(device_type)
if device_type == "cuda":
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32
if device_type == "cpu" and platform.libc_ver()[0] == "glibc":
    # glibc would return each large tensor to the system and get it back page by page,
    # which costs a third of a step. Let glibc keep what is freed (see `man mallopt`).
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-4, 0)  # M_MMAP_MAX
    mallopt(-1, -1)  # M_TRIM_THRESHOLD

if config.dtype == "auto":
    config.dtype = "float32"
    if device_type == "cuda":
        ampere = torch.cuda.get_device_capability()[0] >= 8
        config.dtype = "bfloat16" if ampere else "float16"
    elif device_type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        config.dtype = "bfloat16"
dtype = getattr(torch, config.dtype)
autocast = torch.autocast(device_type, dtype, enabled=dtype != torch.float32)
# In float16, small gradients would be 0. The scaler multiplies the loss, and divides
# gradients.
scaler = torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)

micro_batch_size, n_micro_batches = split_batch(config, world_size)
if distributed:
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30))  # saves take long

# --------------------------------------------------------------------------------------
# 3. Data. A batch depends on the step and the seed alone, so a checkpoint stores no
# place in it

train_data = TokenDataset(config.data_dir, "train", config.context_length)
val_data = TokenDataset(config.data_dir, "val", config.context_length)
tokens_per_step = config.batch_size * config.context_length
nats_per_bpb = math.log(2) * val_data.bytes_per_target(config.eval_tokens)
if checkpoint and checkpoint["data"] != train_data.digest:
    raise UserError(
        f"data_dir={config.data_dir}: not the data that {out_dir} began with"
    )


def get_batch(step):
    """This rank's part of a step's batch: inputs and next tokens, each (B, T)."""
    batch = train_data.batch(step, config.batch_size, config.seed, rank, world_size)
    if device_type == "cuda":  # pinned memory is copied while the GPU computes
        batch = [x.pin_memory() for x in batch]
    return [x.to(device, non_blocking=True) for x in batch]


# --------------------------------------------------------------------------------------
# 4. The model: from this run's checkpoint, from other weights, or from scratch


def load_other(knob):
    """The model that a knob names. Its tokens must be those of the data."""
    path = getattr(config, knob)
    other = load_checkpoint(path)
    if other["tokenizer_digest"] != train_data.tokenizer_digest:
        raise UserError(
            f"{knob}={path}: its tokenizer is not that of {config.data_dir}"
        )
    vocab_size = enlarged_shape(config, train_data.vocab_size).vocab_size
    if other["model_config"].vocab_size != vocab_size:
        sizes = f"{other['model_config'].vocab_size} tokens, the data {vocab_size}"
        raise UserError(f"{knob}={path}: has {sizes}; --round_vocab_to pads them")
    return GPT.from_checkpoint(other, config.context_length).to(device)


torch.manual_seed(config.seed)
first_step = 1
flops = 0  # training FLOPs so far
if checkpoint:
    model = GPT.from_checkpoint(checkpoint)
    first_step = checkpoint["step"] + 1
    flops = checkpoint["flops"]
elif config.init_from:
    model = load_other("init_from")
    take_shape(config, model.config)
else:
    model = GPT(enlarged_shape(config, train_data.vocab_size))
model.to(device)

teacher = None
teacher_flops_per_token = 0
if config.teacher:
    teacher = load_other("teacher").eval()
    teacher.requires_grad_(False)  # else autocast would keep a copy of each weight
    teacher_flops_per_token = teacher.config.flops_per_token() // 3  # forward only


@torch.no_grad()
def soft_targets(tokens, targets):
    """Distributions over the next token, (B, T, vocab_size): the teacher's
    (1503.02531), mixed with the token that came. tokens, targets: (B, T)."""
    with autocast:
        logits = teacher(tokens)
    mixed = logits.float().softmax(-1) * config.teacher_weight
    rest = torch.full(targets.shape, 1 - config.teacher_weight, device=device)
    return mixed.scatter_add_(-1, targets[..., None], rest[..., None])


# The plan: which shape does the model have in each part of the run?
schedule = make_schedule(config)
enlarged = enlarged_shape(config, train_data.vocab_size)
enlarged = replace(
    enlarged, rope_theta=model.config.rope_theta, norm_eps=model.config.norm_eps
)
planned_flops = 0
for n_steps, widths in schedule.segments():
    shape = replace(enlarged, **widths)
    flops_per_token = shape.flops_per_token() + teacher_flops_per_token
    planned_flops += n_steps * tokens_per_step * flops_per_token
final = shape
if checkpoint:
    widths = {kind: schedule.width(first_step - 1, kind) for kind in schedule.widths}
    if model.config != replace(enlarged, **widths):
        raise UserError(
            f"{checkpoint_path}: these knobs ask for another shape than it has"
        )

# A tiny step runs as fast on one thread, and other programs do not slow it down.
threads_are_set = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys()
tiny = (enlarged.flops_per_token() + teacher_flops_per_token) * tokens_per_step < 4e9
if device_type == "cpu" and tiny and not threads_are_set:
    torch.set_num_threads(1)

# --------------------------------------------------------------------------------------
# 5. Optimizer and pruner


def make_optimizers():
    """AdamW, or Muon for the matrices inside the blocks and AdamW for the rest."""
    muon_weights = []
    if config.optimizer == "muon":
        muon_weights = [p for p in model.blocks.parameters() if p.dim() == 2]
    in_muon = set(muon_weights)
    others = [p for p in model.parameters() if p not in in_muon]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.dim() == 2]},
            {"params": [p for p in others if p.dim() == 1], "weight_decay": 0.0},
        ],
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


def same_on_all_ranks(mask):
    """Rank 0 decides which units stay, so that every rank slices the same ones."""
    if distributed:
        dist.broadcast(mask, src=0)
    return mask


optimizers = make_optimizers()
pruner = Pruner(
    config.criterion, config.score_beta, schedule.widths, config.seed, same_on_all_ranks
)
if checkpoint:
    optimizer_of = {
        p: o for o in optimizers for g in o.param_groups for p in g["params"]
    }
    for name, p in model.named_parameters():
        state = checkpoint["optimizer"].get(name, {})
        # Interned, so that pickle writes each key once, as it does in a run without a
        # stop
        state = {sys.intern(key): value.to(device) for key, value in state.items()}
        optimizer_of[p].state[p] = state
    pruner.scores = {
        name: score.to(device) for name, score in checkpoint["scores"].items()
    }
    if scaler.is_enabled():
        scaler.load_state_dict(checkpoint["scaler"])
checkpoint = None  # as large as the model and its moments

# --------------------------------------------------------------------------------------
# 6. Compile, recompute and data parallelism


def empty_pass(model):
    """Forward and backward with a loss of 0, for what torch does in its first
    passes."""
    tokens = torch.zeros((micro_batch_size, config.context_length), dtype=torch.long)
    tokens = tokens.to(device)
    with autocast:
        loss = 0 * model(tokens, tokens)
    loss.backward()


def wrap(model):
    """Under torchrun, DDP averages the gradients over the ranks during the backward
    pass."""
    if not distributed:
        return model
    model._ddp_params_and_buffers_to_ignore = ["cos", "sin"]
    ddp_model = DDP(model, gradient_as_bucket_view=True)
    # DDP sorts its buckets after its first backward pass. Two empty passes let it do so
    # before a step counts, so that a resumed run sums the ranks' gradients in the same
    # order.
    for _ in range(2):
        model.zero_grad()
        empty_pass(ddp_model)
    # Zeros instead of None: DDP rounds differently the first time it sees a gradient.
    model.zero_grad(set_to_none=False)
    return ddp_model


# On a CPU, compiling takes ten seconds and makes a step 1.1 to 1.3 times faster, but
# slower if KV heads are pruned. Windows seldom has a compiler.
compiles = config.compile == "on"
if config.compile == "auto" and os.name != "nt":
    heads_are_pruned = "n_kv_head" in schedule.widths
    pays_on_cpu = planned_flops > 3e13 and not heads_are_pruned
    compiles = device_type == "cuda" or (device_type == "cpu" and pays_on_cpu)
if config.recompute != "none":
    recompute_blocks(model, config.recompute)
if compiles:
    compile_blocks(model, schedule.widths)
    empty_pass(model)
    model.zero_grad()
    compiles = model.compiled  # false, if there is no compiler
ddp_model = wrap(model)

# --------------------------------------------------------------------------------------
# 7. The folder of the run. Nothing has been written so far

step = first_step - 1
if distributed:  # also waits for the checks of all ranks
    steps = [None] * world_size
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise UserError(
            f"the ranks continue from steps {steps}; let all see one {out_dir}"
        )

earlier_lines = []  # of log.jsonl, from before a stop
earlier_seconds = 0.0
log_path = out_dir / "log.jsonl"
if master:
    held = [
        path
        for path in (out_dir / "config.json", log_path, checkpoint_path)
        if path.exists()
    ]
    if held and not (config.resume or config.overwrite):
        advice = "--resume continues it, --overwrite replaces it"
        raise UserError(f"out_dir={out_dir}: holds a run; {advice}")
    if held and not (
        held[0].name == "config.json" and b'"max_steps"' in held[0].read_bytes()
    ):
        raise UserError(f"out_dir={out_dir}: holds {held[0].name} of another program")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out_dir / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"out_dir={out_dir}: another process is running there"
        ) from None
    except OSError as error:
        raise UserError(f"out_dir={out_dir}: cannot write there: {error}") from None
    if first_step == 1:
        checkpoint_path.unlink(missing_ok=True)
    elif log_path.exists():
        for text in log_path.read_bytes().split(b"\n")[
            :-1
        ]:  # a kill may cut the last line
            event = json.loads(text)
            if (
                event["step"] <= step and event["event"] != "done"
            ):  # others are logged again
                earlier_lines.append(text + b"\n")
                earlier_seconds = event["seconds"]


def write_whole(path, write):
    """Fill a file by write(file). After a crash you have either the old file or the new
    one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError
        temporary.unlink(missing_ok=True)
        message = (
            f"step {step}: cannot write {path}: {error}; the previous file is whole"
        )
        raise UserError(message, code=1) from error


def save_checkpoint():
    """Write all that the next step depends on. Nothing in it depends on the clock."""
    if master:
        states = {p: state for o in optimizers for p, state in o.state.items()}
        # Fresh strings, so that pickle writes the same bytes in a run that was resumed
        knobs = json.loads(json.dumps(asdict(config)))
        for key in ("out_dir", "resume", "overwrite", "stop_after"):
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
            "optimizer": {
                n: states[p] for n, p in model.named_parameters() if p in states
            },
            "scores": pruner.scores,
            "scaler": scaler.state_dict(),
        }
        write_whole(checkpoint_path, lambda file: torch.save(checkpoint, file))
    log("save")


stop_signal = 0
stop_signals = []
for name in (
    "SIGINT",
    "SIGTERM",
    "SIGUSR1",
    "SIGBREAK",
):  # USR1: a batch system's warning
    if hasattr(signal, name):
        stop_signals.append(getattr(signal, name))


def request_stop(number, frame):
    """Stop after this step. A second signal ends the process at once."""
    global stop_signal
    stop_signal = number
    for each in stop_signals:
        signal.signal(each, signal.SIG_IGN)
    time.sleep(0.5)  # a terminal and torchrun may both send a signal for the same stop
    for each in stop_signals:
        signal.signal(each, signal.SIG_DFL)


for each in stop_signals:
    signal.signal(each, request_stop)

# --------------------------------------------------------------------------------------
# 8. Log and validation

start_time = time.perf_counter() - earlier_seconds
speed_step = step  # speed is measured from this step and time
speed_time = time.perf_counter()


def log(event, **values):
    """Add a line to log.jsonl, and send it to Weights & Biases."""
    global speed_step, speed_time
    now = time.perf_counter()
    trained = step - 1 if event == "prune" else step  # the steps that are done
    if (
        event != "step"
    ):  # time in validations, saves and prunes does not count as training
        speed_step = trained
        speed_time = now
    line = {"event": event, "step": step, "tokens": trained * tokens_per_step}
    line |= {"flops": flops, "seconds": round(now - start_time, 3), **values}
    if master:
        try:
            with open(log_path, "ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise UserError(
                f"step {step}: cannot write the log: {error}", code=1
            ) from error
    if wandb:
        wandb.log({f"{event}/{key}": value for key, value in line.items()}, step=step)


def say(text):
    """Print a line above the progress bar. If nobody reads it, the run goes on in
    silence."""
    if master:
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError:
            drop_output()


def log_step():
    """Log a training step, with its speed since the last one, and show it."""
    global speed_step, speed_time
    now = time.perf_counter()
    tokens_per_second = (step - speed_step) * tokens_per_step / (now - speed_time)
    speed_step = step
    speed_time = now
    shape = model.config
    phase = schedule.phase(step)
    flops_per_second = flops_per_token * tokens_per_second
    mfu = {}
    if peak := peak_flops(device):  # model FLOPs utilization, the share of the peak
        mfu["mfu"] = round(flops_per_second / world_size / peak, 4)
    log(
        "step",
        loss=loss,
        lr=lr,
        grad_norm=grad_norm,
        tokens_per_second=round(tokens_per_second),
        **mfu,
        params=shape.n_params(),
        d_ff=shape.d_ff,
        n_kv_head=shape.n_kv_head,
        d_model=shape.d_model,
        n_layer=shape.n_layer,
        phase=phase,
    )
    bar.set_postfix_str(f"loss {loss:.4f}, {phase}", refresh=False)
    if bar.disable:  # there is no terminal for the bar
        size = f"{compact(shape.n_params())} parameters"
        speed = f"{compact(tokens_per_second)} tok/s"
        left = tqdm.format_interval((planned_flops - flops) / flops_per_second)
        text = f"step {step:6}/{config.max_steps}  loss {loss:.4f} {speed} {size}"
        say(f"{text} {left} left lr {lr:.1e} {phase}")


@torch.no_grad()
def validate(max_tokens):
    """The mean loss, in nats per token, over the first `max_tokens` tokens of the val
    split."""
    model.eval()  # compiled blocks are for the shapes of training
    losses = []
    for i, (inputs, targets) in enumerate(
        val_data.in_order(micro_batch_size, max_tokens)
    ):
        if i % world_size == rank:
            with autocast:
                loss = model(inputs.to(device), targets.to(device))
            losses.append((loss, targets.numel()))
    model.train()
    nats = sum(loss.item() * n_tokens for loss, n_tokens in losses)
    n_tokens = sum(n_tokens for _, n_tokens in losses)
    total = torch.tensor([nats, n_tokens], dtype=torch.float64)
    if distributed:
        total = total.to(device)
        dist.all_reduce(total)
    nats, n_tokens = total.tolist()
    if not math.isfinite(nats):
        raise UserError(f"validation at step {step}: loss {nats}; {DIVERGED}", code=1)
    return nats / n_tokens


DIVERGED = "try a lower --learning_rate, with --resume from the last checkpoint"
wandb = None
if master and config.wandb_project:
    try:
        import wandb
    except ImportError:
        raise UserError("wandb_project: first run: pip install wandb") from None
    wandb.init(project=config.wandb_project, name=out_dir.name, config=asdict(config))
if master:
    write_whole(log_path, lambda file: file.writelines(earlier_lines))
    knobs = json.dumps(asdict(config), indent=1)
    write_whole(out_dir / "config.json", lambda file: file.write(knobs.encode()))

compute = f"{device_type}, {config.dtype}, {'compiled' if compiles else 'eager'}"
say(describe_run(config, schedule, enlarged, planned_flops, train_data.tokens))
say(f"machine    {compute}, ranks: {world_size}, threads: {torch.get_num_threads()}")
say(f"output     {out_dir}" + (f", continuing from step {step}" if step else ""))
for change in changes:
    say(f"changed    {change}")
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

last_step = config.stop_after or config.max_steps
val_loss = None
stopping = False
inputs, targets = get_batch(first_step)
bar = tqdm(
    total=config.max_steps, initial=step, unit="step", disable=None if master else True
)
for step in range(first_step, last_step + 1):
    # Schedule: one cosine over the whole run
    lr = schedule.learning_rate(step)
    if schedule.restarts(step):  # the naive arm only: fresh moments, a second cosine
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
            log(
                "prune",
                kind=kind,
                width_before=old_width,
                width_after=width,
                params=model.config.n_params(),
                loss_before=loss_before,
                loss_after=loss_after,
                **record,
            )
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
            micro_targets = soft_targets(inputs[rows], micro_targets)
        if distributed:  # average the gradients over the ranks only once per step
            ddp_model.require_backward_grad_sync = i == n_micro_batches - 1
        with autocast:
            micro_loss = ddp_model(inputs[rows], micro_targets) / n_micro_batches
        scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    del micro_loss, micro_targets  # the graph would keep weights alive across a prune
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    scaler.update()  # the next step's scale: smaller, if a gradient overflowed
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    inputs, targets = get_batch(step + 1)  # while the GPU computes

    # Check: only finite gradients reach the weights. Here the CPU waits for the GPU
    numbers = torch.stack(
        [loss, norm, torch.tensor(float(stop_signal > 0), device=device)]
    )
    if distributed:
        dist.all_reduce(numbers)
        numbers /= world_size
    loss, grad_norm, stop_share = numbers.tolist()
    stopping = (
        stop_share > 0
    )  # if any rank got a signal, all of them stop after this step
    skip = scaler.is_enabled() and not math.isfinite(grad_norm)  # float16 overflowed
    if not skip and not math.isfinite(loss + grad_norm):
        numbers = f"loss {loss:.3g}, gradient norm {grad_norm:.3g}"
        raise UserError(f"step {step}: {numbers}: not finite; {DIVERGED}", code=1)

    # Score: how much does each unit matter? Before the gradients are clipped
    if schedule.scoring(step):
        pruner.score(model)

    # Update
    if config.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
    for optimizer in optimizers:
        if not skip:
            optimizer.step()
        optimizer.zero_grad(
            set_to_none=not distributed
        )  # DDP keeps gradients in its buckets
    flops_per_token = model.config.flops_per_token() + teacher_flops_per_token
    flops += flops_per_token * tokens_per_step

    # Log, validate, save, stop
    bar.update()
    if skip:
        log("skip", scale=scaler.get_scale())
        say(f"skip       step {step}: gradients overflow")
        if scaler.get_scale() < 1:
            raise UserError(
                f"step {step}: gradients overflow at any scale; {DIVERGED}", code=1
            )
    elif step % config.log_every == 0 or step == config.max_steps:
        log_step()
    if step % config.eval_every == 0 or step == config.max_steps:
        val_loss = validate(config.eval_tokens)
        log("eval", val_loss=val_loss, val_bpb=val_loss / nats_per_bpb)
        bits = f"{val_loss / nats_per_bpb:.4f} bits per byte"
        say(f"eval       step {step}: {val_loss:.4f} nats per token, {bits}")
    if step % config.save_every == 0 or step == last_step or stopping:
        save_checkpoint()
    if stopping:
        break

# --------------------------------------------------------------------------------------
# 10. The end

bar.close()
folder = shlex.quote(str(out_dir))
if step < config.max_steps:
    command = f"python train.py {folder} --resume"
    say(f"stopped after step {step}, saved. Continue with: {command}")
else:
    if val_loss is None:  # a run that was done has been resumed
        val_loss = validate(config.eval_tokens)
    log(
        "done",
        val_loss=val_loss,
        val_bpb=val_loss / nats_per_bpb,
        params=final.n_params(),
    )
    say(f"\nloss       {val_loss:.4f} nats per token on the validation split")
    say(f"seconds    {time.perf_counter() - start_time:.0f}")
    say(f"sample     python -m tools.sample {folder}")
    say(f"picture    python -m tools.plot {folder}")
if wandb:
    wandb.finish()
if distributed:
    dist.barrier()  # rank 0 may still save, and torchrun ends all ranks with the first
    dist.destroy_process_group()
if stopping:
    sys.exit(128 + (stop_signal or signal.SIGTERM))
