"""What a GPU can do with this project, in one table: python -m tools.gpu_check [--out FOLDER]

Each line says ok, failed with the error, or a figure. It takes about half an hour. The output of
every command goes to FOLDER/NAME.txt; the table, in Markdown, can go into results/speed.md.
--only NAME,NAME runs these lines alone (export needs default). Any other --key=value is a knob for
all runs: with --device=cpu and small shapes it also works without a GPU.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from run.folder import read_log
from tools import command

ROOT = Path(__file__).parent.parent
TRAIN, BENCH = ["train.py"], ["-m", "tools.bench", "--compile=on"]
# A few steps on the shipped data, with a vocabulary padded to GPT-2's size
FEW_STEPS = ["--max_steps=12", "--warmup_steps=2", "--prune_every=3", "--score_beta=0.5"]
FEW_STEPS += ["--batch_size=4", "--log_every=1", "--eval_tokens=8192"]
FEW_STEPS += ["--data_dir=data/sotu", "--round_vocab_to=50304"]
ONE_RANK = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "train.py"]
SHORT = ["configs/idea.py", "--shorter=10"]


def checks(out: Path) -> dict[str, list[list[str]]]:
    """Name -> commands, of which each must succeed before the next; the last one has the figure."""
    runs = {name: f"--out_dir={out / name}" for name in ("default", "big", "torchrun")}
    return {
        "suite": [["-m", "pytest", "-q", "-m", "not slow"]],
        "default": [[*TRAIN, "configs/idea.py", "--compile=on", "--overwrite", runs["default"]]],
        "bench 12M": [[*BENCH, "configs/idea_12m.py"]],
        "bench GPT-2": [[*BENCH, "configs/idea_gpt2.py"]],
        "bench 2.8B": [[*BENCH, "configs/idea_2.8b.py", "--n_layer=2"]],
        "big": [[*TRAIN, "configs/idea_2.8b.py", *FEW_STEPS, "--overwrite", runs["big"]]],
        "torchrun": [
            [*ONE_RANK, *SHORT, "--stop_after=30", "--overwrite", runs["torchrun"]],
            [*ONE_RANK, *SHORT, "--resume", runs["torchrun"]],
        ],
        "export": [
            ["-m", "tools.export", str(out / "default"), "--to", str(out / "hf")],
            ["-m", "tools.gpu_check", "--generate", str(out / "hf")],
        ],
    }


def figure(output: str, folder: Path) -> str:
    """What a command's output, or its run's log, says in a line."""
    table = re.findall(r"^\| (?!what|---)(.+) \| (.+) \|$", output, re.MULTILINE)
    if table:
        return "; ".join(f"{what}: {result}" for what, result in table)
    log = read_log(folder)
    if log:
        speeds = [e["tokens_per_second"] for e in log if e["event"] == "step"]
        done = log[-1]
        return f"loss {done['val_loss']:.4f}, {done['seconds']:.0f} s, {speeds[-1]:,} tokens/s"
    return output.strip().rpartition("\n")[2]


def check(name: str, commands: list[list[str]], knobs: list[str], out: Path) -> str:
    """Run the commands. Returns the cell of the table."""
    began, output = time.perf_counter(), ""
    for arguments in commands:
        takes_knobs = "train.py" in arguments or "tools.bench" in arguments
        call = [sys.executable, *arguments, *(knobs if takes_knobs else [])]
        result = subprocess.run(
            call, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output += result.stdout
        (out / f"{name}.txt").write_text(output)
        if result.returncode:
            last = result.stdout.strip().rpartition("\n")[2]
            return f"FAILED, exit code {result.returncode}: {last[:200]}"
    return f"ok, {time.perf_counter() - began:.0f} s. {figure(output, out / name)}"


def generate(folder: str) -> None:
    """Print how fast transformers continues a text with an exported model."""
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).to(device)
    for rows in (1, 32):
        prompt = torch.zeros(rows, 1, dtype=torch.long, device=device)
        for _ in range(2):  # the first one is slow
            began = time.perf_counter()
            model.generate(prompt, min_new_tokens=100, max_new_tokens=100, do_sample=False)
            seconds = time.perf_counter() - began
        print(f"| generate, batch {rows} | {100 * rows / seconds:,.0f} tokens/s |")


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("out/gpu_check"))
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="NAME,NAME")
    parser.add_argument("--generate", metavar="FOLDER", help=argparse.SUPPRESS)
    args, knobs = parser.parse_known_args(argv)
    if args.generate:
        generate(args.generate)
        return 0
    out = args.out.resolve()
    every, failed = checks(out), 0
    unknown = set(args.only or ()) - every.keys()
    if unknown:
        parser.error(f"--only: no {', '.join(unknown)}; there are {', '.join(every)}")
    out.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{card}, torch {torch.__version__}\n\n| check | result |\n| --- | --- |", flush=True)
    for name in args.only or every:
        cell = check(name, every[name], knobs, out)
        failed += cell.startswith("FAILED")
        print(f"| {name} | {cell} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
