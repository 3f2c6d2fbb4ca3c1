"""Training steps here and in nanoGPT, in turns: python -m studies.speed.race --nanogpt FOLDER

On a CPU, two shapes: nanoGPT's recipe for a CPU, and one of 12M parameters. On a GPU, GPT-2's. Ours
have as many parameters, to 2%, and see as many tokens in a step.
"""

import argparse
import base64
import contextlib
import importlib.util
import lzma
import pickle
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from data.loader import TokenDataset
from data.prepare import prepare
from run import machine
from run.config import Config, enlarged_shape
from run.cost import n_parameters
from run.folder import read_log
from tools import command
from tools.bench import Step, race, seconds_of

ROOT = Path(__file__).parent.parent.parent
REPEATS = 5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Shape:
    name: str
    theirs: dict  # nanoGPT's GPTConfig
    ours: dict  # knobs
    vocab_size: int
    batch_size: int


SHAPES = [
    Shape(
        "nanoGPT's CPU recipe (4 layers, width 128, context 64, batch 12)",
        {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "bias": False},
        {"n_layer": 4, "n_head": 4, "n_kv_head": 4, "d_model": 128, "d_ff": 344},
        vocab_size=256,
        batch_size=12,
    ),
    Shape(
        "12M (6 layers, width 384, context 256, batch 16)",
        {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "bias": False},
        {"n_layer": 6, "n_head": 6, "n_kv_head": 6, "d_model": 384, "d_ff": 1024},
        vocab_size=4096,
        batch_size=16,
    ),
]
ON_GPU = [
    Shape(
        "GPT-2 (12 layers, width 768, context 1,024, batch 12)",
        {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "bias": False},
        {"n_layer": 12, "n_head": 12, "n_kv_head": 12, "d_model": 768, "d_ff": 2048},
        vocab_size=50_304,
        batch_size=12,
    ),
]


def nanogpt(folder: Path):
    """nanoGPT's module model.py, under another name: ours is called model, too."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


class TheirStep:
    """A step of nanoGPT: forward, backward, AdamW. Nothing is clipped, here as there."""

    def __init__(self, module, shape: Shape, dtype: torch.dtype, compiled: bool):
        torch.manual_seed(1)
        config = module.GPTConfig(vocab_size=shape.vocab_size, dropout=0.0, **shape.theirs)
        with contextlib.redirect_stdout(None):  # it prints its parameters
            self.model, self.dtype = module.GPT(config).to(DEVICE), dtype
            self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), DEVICE.type)
        self.forward = torch.compile(self.model) if compiled else self.model
        size = shape.batch_size, shape.theirs["block_size"]
        self.x, self.y = torch.randint(shape.vocab_size, (2, *size), device=DEVICE)

    def __call__(self) -> None:
        with torch.autocast(DEVICE.type, self.dtype, enabled=self.dtype != torch.float32):
            _, loss = self.forward(self.x, self.y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def our_step(shape: Shape, dtype: str, optimizer: str, compiled: bool) -> Step:
    c = config_of(shape, dtype, optimizer)
    full = enlarged_shape(c, shape.vocab_size)
    return Step(c, full, DEVICE, compile_for=() if compiled else None)


def config_of(shape: Shape, dtype: str = "auto", optimizer: str = "muon") -> Config:
    size = {"batch_size": shape.batch_size, "context_length": shape.theirs["block_size"]}
    return Config(**shape.ours, **size, dtype=dtype, optimizer=optimizer)


def steps(module, shape: Shape) -> list[str]:
    """Rows of a table: what, nanoGPT's ms, ours, ratio."""
    on_gpu = DEVICE.type == "cuda"  # where both compile, in bfloat16, by default
    default = torch.bfloat16 if on_gpu else torch.float32
    settings = {  # their dtype, ours, our optimizer, compiled
        "each at its default": (default, "auto", "muon", on_gpu),
        "float32, AdamW, eager": (torch.float32, "float32", "adamw", False),
        "float32, AdamW, compiled": (torch.float32, "float32", "adamw", True),
        "bfloat16, AdamW, compiled": (torch.bfloat16, "bfloat16", "adamw", True),
    }
    racers = []
    for dtype, our_dtype, optimizer, compiled in settings.values():
        racers.append(TheirStep(module, shape, dtype, compiled))
        racers.append(our_step(shape, our_dtype, optimizer, compiled))
    theirs = sum(p.numel() for p in racers[0].model.parameters())
    ours = n_parameters(enlarged_shape(config_of(shape), shape.vocab_size))
    assert abs(ours / theirs - 1) < 0.02, (ours, theirs)
    rows = [f"| **{shape.name}**: {theirs:,} and {ours:,} parameters | | | |"]
    times = race(racers, REPEATS)
    for name, a, b in zip(settings, times[::2], times[1::2]):
        rows.append(f"| {name} | {a * 1e3:.1f} | {b * 1e3:.1f} | {a / b:.2f} |")
    return rows


def loss_of(module, path: Path, val: TokenDataset) -> float:
    """Nats per byte of nanoGPT's checkpoint on the whole validation split, as ours are measured."""
    state = torch.load(path, weights_only=False)
    with contextlib.redirect_stdout(None):
        model = module.GPT(module.GPTConfig(**state["model_args"])).eval()
    model.load_state_dict(state["model"])
    with torch.no_grad():
        losses = [(model(x, y)[1].item(), y.numel()) for x, y in val.in_order(64)]
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


def whole_runs(module, folder: Path) -> list[str]:
    """Both train.py from start to end, on a part of the shipped speeches, byte by byte. Ours also
    with fewer steps."""
    shape, rows = SHAPES[0], []
    with tempfile.TemporaryDirectory() as tmp:
        work = Path(tmp)
        text = lzma.decompress((ROOT / "data/corpus/sotu.jsonl.xz").read_bytes())[:1_100_000]
        (work / "text.txt").write_bytes(text)
        # A vocabulary of single bytes, as tiktoken writes it: base64 and rank
        ranks = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
        (work / "bytes.tiktoken").write_text("".join(ranks))
        prepare([work / "text.txt"], str(work / "bytes.tiktoken"), work / "data", 0.1)
        val = TokenDataset(work / "data", "val", 64)
        data = folder / "data" / "enlarge_prune_race"  # nanoGPT reads the same files
        data.mkdir(exist_ok=True)
        for name in ("train", "val"):
            shutil.copy(work / "data" / f"{name}_000.bin", data / f"{name}.bin")
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": val.vocab_size}))
        recipe = "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --dropout=0.0"
        recipe += " --always_save_checkpoint=True"
        recipe += " --max_iters=2000 --lr_decay_iters=2000 --block_size=64"
        recipe += " --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128"
        theirs = f"train.py config/train_shakespeare_char.py --dataset={data.name} {recipe}"
        seconds = seconds_of_run(f"{theirs} --out_dir={work / 'theirs'}", folder)
        loss = loss_of(module, work / "theirs" / "ckpt.pt", val)
        rows.append(f"| nanoGPT's run of 2,000 steps | {seconds:.0f} s | {loss:.3f} | |")
        shutil.rmtree(data)
        knobs = shape.ours | {"batch_size": 12, "context_length": 64, "max_steps": 2000}
        knobs |= {"device": "cpu"}  # as theirs
        knobs |= {"data_dir": work / "data", "out_dir": work / "ours", "learning_rate": 5e-3}
        knobs |= {"warmup_steps": 100, "min_lr_fraction": 0.01, "eval_every": 1000}
        (work / "race.py").write_text("")
        ours = f"train.py {work / 'race.py'} " + " ".join(f"--{k}={v}" for k, v in knobs.items())
        for shorter in (1, 4, 8):
            mine = seconds_of_run(f"{ours} --shorter={shorter} --overwrite", ROOT)
            loss = read_log(work / "ours")[-1]["val_loss"]
            what = f"ours, {2000 // shorter:,} steps"
            rows.append(f"| {what} | {mine:.0f} s | {loss:.3f} | {seconds / mine:.2f} |")
    return rows


def seconds_of_run(call: str, folder: Path) -> float:
    program = [sys.executable, *call.split()]
    return seconds_of(lambda: subprocess.run(program, cwd=folder, check=True, capture_output=True))


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nanogpt", type=Path, required=True, metavar="FOLDER", help="a clone")
    parser.add_argument("--whole", action="store_true", help="whole runs, too")
    args = parser.parse_args(argv)
    machine.keep_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| | nanoGPT, ms | ours, ms | ratio |\n| --- | --- | --- | --- |")
    module = nanogpt(args.nanogpt)
    for shape in ON_GPU if DEVICE.type == "cuda" else SHAPES:
        print("\n".join(steps(module, shape)), flush=True)
    if args.whole:
        print("\n| | time | loss, nats per byte | ratio of the times |\n| --- | --- | --- | --- |")
        print("\n".join(whole_runs(module, args.nanogpt.resolve())))


if __name__ == "__main__":
    sys.exit(main())
