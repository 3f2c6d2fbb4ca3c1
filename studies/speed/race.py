"""Training steps here and in nanoGPT, in turns: python -m studies.speed.race SHAPE --nanogpt FOLDER

Ours have as many parameters, to 2%, and see as many tokens in a step. A process has one shape:
where torch has compiled for one size, it compiles the next for all sizes, and that is slower.
"""

import argparse
import contextlib
import importlib.util
import sys
from pathlib import Path

import torch

from data.command import command
from run.config import Config, enlarged_shape
from run.cost import n_parameters
from run.machine import Machine
from tools.bench import Step, race

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


SHAPES = {  # layers, heads, width, context, d_ff of ours, vocabulary, batch
    "recipe": (4, 4, 128, 64, 344, 256, 12),  # nanoGPT's for a CPU
    "12M": (6, 6, 384, 256, 1024, 4096, 16),
    "gpt2": (12, 12, 768, 1024, 2048, 50_304, 12),  # for a GPU
}


def nanogpt(folder: Path):
    """nanoGPT's module model.py, under another name: ours is called model, too."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


class TheirStep:
    """A step of nanoGPT: forward, backward, AdamW. Nothing is clipped, here as there."""

    def __init__(self, module, config, batch_size: int, dtype: torch.dtype, compiled: bool):
        torch.manual_seed(1)
        with contextlib.redirect_stdout(None):  # it prints its parameters
            self.model, self.dtype = module.GPT(config).to(DEVICE), dtype
            self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), DEVICE.type)
        self.forward = torch.compile(self.model) if compiled else self.model
        size = 2, batch_size, config.block_size
        self.x, self.y = torch.randint(config.vocab_size, size, device=DEVICE)

    def __call__(self) -> None:
        with torch.autocast(DEVICE.type, self.dtype, enabled=self.dtype != torch.float32):
            _, loss = self.forward(self.x, self.y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--nanogpt", type=Path, required=True, metavar="FOLDER", help="a clone")
    args = parser.parse_args(argv)
    layers, heads, width, context, d_ff, vocab_size, batch_size = SHAPES[args.shape]
    module = nanogpt(args.nanogpt)
    size = {"n_layer": layers, "n_head": heads, "n_embd": width, "block_size": context}
    config = module.GPTConfig(**size, vocab_size=vocab_size, bias=False, dropout=0.0)
    size = {"n_layer": layers, "n_head": heads, "n_kv_head": heads, "d_model": width, "d_ff": d_ff}
    size |= {"batch_size": batch_size, "context_length": context}
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
        c = Config(**size, dtype=our_dtype, optimizer=optimizer)
        shape, here = enlarged_shape(c, vocab_size), Machine(c)  # sets the C library up for both
        racers.append(TheirStep(module, config, batch_size, dtype, compiled))
        racers.append(Step(c, shape, here, "on" if compiled else "off"))
    theirs, ours = sum(p.numel() for p in racers[0].model.parameters()), n_parameters(shape)
    assert abs(ours / theirs - 1) < 0.02, (ours, theirs)
    print(f"{args.shape}: {theirs:,} and {ours:,} parameters, {torch.get_num_threads()} threads\n")
    print("| | nanoGPT, ms | ours, ms | ratio |\n| --- | --- | --- | --- |")
    times = race(racers, repeats=5)
    for name, a, b in zip(settings, times[::2], times[1::2]):
        print(f"| {name} | {a * 1e3:.1f} | {b * 1e3:.1f} | {a / b:.2f} |")


if __name__ == "__main__":
    sys.exit(main())
