"""How a run is saved, and how it comes back. A checkpoint holds tensors and plain containers only,
so loading one cannot run code. It is written aside, flushed and renamed: a kill at any moment
leaves a whole one. Nothing in it depends on the clock, so equal runs leave equal bytes."""

import hashlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from data.command import UserError
from data.loader import TokenDataset
from data.tokenizer import all_tokens, load_tokenizer
from model import GPT, GPTConfig
from prune import Optimizers, Pruner
from run.config import NOT_SAVED, Config, need, of_torchrun, take_shape
from run.hugging_face import load_folder, read_shape
from run.machine import NO_MEMORY, Machine

FORMAT = "enlarge-prune 5"
NAME = "checkpoint.pt"


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Fill a file by `write(file)`. Raises OSError."""
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.unlink(missing_ok=True)  # left by a kill; or a link to what is not ours
        with open(aside, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)  # a power cut may undo it, and then the old file is whole
    except (OSError, RuntimeError) as error:  # torch.save: a RuntimeError, in place of an OSError
        aside.unlink(missing_ok=True)
        first = error.__context__ if isinstance(error, RuntimeError) else None
        raise OSError(f"cannot write {path}: {first or error}") from error


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


def write_checkpoint(
    c: Config, step: int, model: GPT, optimizers: Optimizers, scores: dict, others: dict, was=0
) -> None:
    """Save all that the step after `step` depends on. others: OutDir's digests and, in float16, the
    state of the scaler. was: the step of the checkpoint that is there; 0: none. Raises OSError."""
    moments = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    saved = {
        "format": FORMAT,
        "config": json.dumps({k: v for k, v in vars(c).items() if k not in NOT_SAVED}),
        **others,
        "model_config": json.dumps(asdict(model.config)),
        "step": step,
        "model": dict(model.state_dict()),
        "optimizer": {n: moments[p] for n, p in model.named_parameters() if p in moments},
        "scores": scores,
    }
    folder = Path(c.out_dir)
    if c.keep > 1 and 0 < was < step:
        keep_last(folder, was)
    write_whole(folder / NAME, lambda file: torch.save(saved, file))
    if c.keep > 1:
        drop_kept(folder, step, c.keep - 1)


def keep_last(folder: Path, step: int) -> None:
    """Give the checkpoint, which is of `step`, a second name that outlives the next save."""
    path, kept = folder / NAME, folder / f"checkpoint-{step}.pt"
    kept.unlink(missing_ok=True)  # of a run that went on from an earlier step
    try:
        os.link(path, kept)
    except OSError:  # a disk without links
        with open(path, "rb") as file:
            write_whole(kept, lambda copy: shutil.copyfileobj(file, copy))


def drop_kept(folder: Path, step: int, n: int) -> None:
    """Of the checkpoints with a step in their name, leave the last `n` before `step`."""
    kept = {int(p.stem[11:]): p for p in folder.glob("checkpoint-*.pt") if p.stem[11:].isdecimal()}
    before = sorted(s for s in kept if s < step)
    for s in kept.keys() - set(before[len(before) - n :] if n else ()):
        kept[s].unlink()


def load_checkpoint(path: Path) -> dict:
    """What write_checkpoint saved, on the CPU; `config` is a dict of all knobs, `model_config` a
    GPTConfig. Raises UserError if missing, damaged or not ours, OSError if it cannot be read."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        # torch.load compares no checksums. One rank of a machine does; the others wait at the start
        with zipfile.ZipFile(path) as archive:
            if of_torchrun("LOCAL_RANK", 0) == 0 and (damaged := archive.testzip()):
                raise ValueError(f"{damaged} is damaged")
        # Mapped: the ranks of a machine read it into one memory. On Windows, a file that is mapped
        # cannot be replaced, so those who call this keep copies of its tensors
        mapped = str(path).isascii() or "utf" in sys.getfilesystemencoding()  # torch's limit
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if saved["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        saved["config"] = vars(Config()) | json.loads(saved["config"])  # old ones lack new knobs
        saved["model_config"] = GPTConfig(**json.loads(saved["model_config"]))
        with torch.device("meta"):  # tensors without numbers, to compare names and shapes
            GPT(saved["model_config"]).load_state_dict(saved["model"], assign=True)
        return saved
    except Exception as error:  # torch raises whatever a damaged or foreign file leads it to
        if isinstance(error, (OSError, *NO_MEMORY)):
            raise OSError(f"cannot read {path}: {str(error) or 'out of memory'}") from error
        raise UserError(f"{path}: damaged, or not a checkpoint of this code ({FORMAT})") from error


def load_weights(path: Path, only_shape: bool = False) -> dict:
    """At least `model_config`, and `model` unless only_shape, of a run's folder, a checkpoint or a
    Hugging Face folder. Raises UserError, OSError."""
    if not path.exists():
        runs = sorted(file.parent.name for file in path.parent.glob(f"*/{NAME}"))
        where = f"in {path.absolute().parent} there is {', '.join(runs) or 'none'}"
        raise UserError(f"{path}: no such run; {where}")
    if path.is_dir() and not ((path / NAME).exists() or (path / "log.jsonl").exists()):
        return {"model_config": read_shape(path)} if only_shape else load_folder(path)
    return load_checkpoint(path / NAME if path.is_dir() else path)


def tokenizer_of(saved: dict, path: Path) -> str:
    """The tokenizer of what load_weights has loaded, as load_tokenizer takes it. A Hugging Face
    folder holds its own, a run's is in its data. Raises UserError."""
    if "config" not in saved:
        return str(path)
    data_dir = saved["config"]["data_dir"]
    data = TokenDataset(data_dir, "val", context_length=1)
    if saved.get("data") != data.digest and saved.get("tokenizer") != data.tokenizer_digest:
        raise UserError(f"{path}: was not trained on the data that {data_dir} holds now")
    return data.tokenizer


def check_tokenizer(c: Config, key: str, given: dict, data: TokenDataset) -> str:
    """Refuse the model that this knob names where a token stands for one text in it, and for
    another in the data: UserError. Returns why that cannot be known, or ""."""
    if given.get("tokenizer") == data.tokenizer_digest:
        return ""
    try:  # other files may have the same tokens
        names = tokenizer_of(given, Path(getattr(c, key))), data.tokenizer
        theirs, ours = (all_tokens(load_tokenizer(name)) for name in names)
    except (UserError, ModuleNotFoundError) as error:
        return f"{key}={getattr(c, key)!r}: for its tokenizer, {error}"
    # One may have more tokens, which pad it, or another end of a text: all_tokens gives "" for that
    same = all(a == b for a, b in zip(theirs, ours) if a and b)
    need(same, c, key, f"its tokenizer is not that of data_dir={c.data_dir!r}")
    return ""


def load_init_from(c: Config, data: TokenDataset, machine: Machine) -> tuple[Config, dict]:
    """`c` in the shape of `c.init_from`; its weights, as at step 0. Raises UserError, OSError."""
    given = load_weights(Path(c.init_from))
    c = take_shape(c, given["model_config"], data.vocab_size)
    unknown = check_tokenizer(c, "init_from", given, data)
    if unknown and machine.rank == 0:
        print(f"warning: {unknown}; it should be that of the data", file=sys.stderr)
    shape = replace(given["model_config"], context_length=c.context_length)
    start = {"model_config": shape, "init_from": digest_of(shape, given["model"])}
    return c, {**given, **start, "step": 0, "optimizer": {}, "scores": {}}


def digest_of(shape: GPTConfig, weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(repr(shape).encode())
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_model(saved: dict, device: torch.device) -> GPT:
    """The model of a checkpoint or of a Hugging Face folder, whatever its widths. It is made on the
    device, so the memory of the machine holds no second copy."""
    with device:
        model = GPT(saved["model_config"])
    model.load_state_dict(saved["model"])
    return model.to(device)  # its cos and sin, which GPT makes on the CPU


def load_history(
    saved: dict, model: GPT, optimizers: Optimizers, pruner: Pruner, scaler: torch.amp.GradScaler
) -> None:
    """Give the optimizers and the pruner what a checkpoint holds of each parameter and group, and
    in float16 the scaler of gradients its scale."""
    optimizer_of = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        moments = saved["optimizer"].get(name, {}).items()
        # Pickle writes a string once per object: with interned keys, equal runs save equal bytes
        optimizer_of[p].state[p] = {sys.intern(key): x.to(p, copy=True) for key, x in moments}
    pruner.scores = {n: x.to(model.norm.weight, copy=True) for n, x in saved["scores"].items()}
    if scaler.is_enabled() and saved["step"]:
        scaler.load_state_dict(saved["scaler"])
