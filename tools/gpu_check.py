"""What a GPU can do with this project, in one table: python -m tools.gpu_check [--out FOLDER]

Each line says ok, failed with the error, or a figure. It takes about half an hour. The output of
every command goes to FOLDER/NAME.txt; the table, in Markdown, can go into results/speed.md.
--only NAME,NAME runs these lines alone. --nanogpt CLONE also times nanoGPT. Any other --key=value
is a knob for all runs: with --device=cpu and small shapes it also works without a GPU.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from run.folder import read_log
from run.read_config import load_config
from tools import bench, command
from tools.load import load_plan
from tools.plan import GPT2_VOCABULARY, GPUS

ROOT = Path(__file__).parent.parent
TRAIN, BENCH = ["train.py"], ["-m", "tools.bench", "--compile=on"]
THIS = ["-m", "tools.gpu_check"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
LIMIT = 1800  # seconds that a command may take
EXPORTED = "hf enlarged", "hf pruned"
# A few steps on the shipped data, with a vocabulary padded to GPT-2's size
FEW_STEPS = ["--max_steps=12", "--warmup_steps=2", "--prune_every=3", "--score_beta=0.5"]
FEW_STEPS += ["--batch_size=4", "--log_every=1", "--eval_tokens=8192"]
FEW_STEPS += ["--data_dir=data/sotu", "--round_vocab_to=50304"]


def checks(out: Path, nanogpt: str | None) -> dict[str, list[list[str]]]:
    """Name -> commands, of which each must succeed before the next; the last one has the figure."""

    def run(name: str, config: str, *knobs: str, launcher: list[str] = ()) -> list[str]:
        return [*launcher, *TRAIN, f"configs/{config}.py", f"--out_dir={out / name}", *knobs]

    one, every = ([*TORCHRUN, f"--nproc_per_node={n}"] for n in (1, torch.cuda.device_count()))
    export = ["-m", "tools.export", str(out / "export"), "--to"]
    enlarged, pruned = (str(out / name) for name in EXPORTED)
    commands = {
        "suite": [["-m", "pytest", "-q", "-m", "not slow"]],
        "default": [run("default", "idea", "--compile=on", "--overwrite")],
        "bench 12M": [[*BENCH, "configs/idea_12m.py"]],
        "bench GPT-2": [[*BENCH, "configs/idea_gpt2.py"]],
        "bench 2.8B": [[*BENCH, "configs/idea_2.8b.py", "--n_layer=2"]],
        "memory 2.8B": [[*THIS, "--memory", "configs/idea_2.8b.py"]],
        "big": [run("big", "idea_2.8b", *FEW_STEPS, "--overwrite")],
        "torchrun": [
            run("torchrun", "idea", "--shorter=10", "--stop_after=30", "--overwrite", launcher=one),
            run("torchrun", "idea", "--shorter=10", "--resume", launcher=one),
        ],
        "all cards": [run("all cards", "idea", "--shorter=10", "--overwrite", launcher=every)],
        "export": [  # the model before its first prune, and at the end
            run("export", "idea_gpt2", *FEW_STEPS, "--overwrite", "--stop_after=2"),
            [*export, enlarged],
            run("export", "idea_gpt2", *FEW_STEPS, "--resume"),
            [*export, pruned],
            [*THIS, "--generate", enlarged],
            [*THIS, "--generate", pruned],
        ],
        "nanoGPT": [["-m", "experiments.nanogpt.race", "--nanogpt", str(nanogpt)]],
    }
    if torch.cuda.device_count() < 2:
        del commands["all cards"]
    if not nanogpt:
        del commands["nanoGPT"]
    return commands


def figure(output: str, folder: Path) -> str:
    """What a command's output, or its run's log, says in a line."""
    table = re.findall(r"^\| (?!what|---)(.+?) \| (.+) \|$", output, re.MULTILINE)
    if table:
        return "; ".join(f"{what}: {result}" for what, result in table).replace(" | ", ", ")
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
        takes_knobs = {"train.py", "tools.bench", "--memory"} & set(arguments)
        call = ["timeout", "--kill-after=60", str(LIMIT), sys.executable, *arguments]
        call += knobs if takes_knobs else []
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(call, cwd=ROOT, text=True, **streams) as process:
            try:
                printed = process.communicate()[0]
            except KeyboardInterrupt:  # timeout does not get Ctrl-C, but passes this on
                process.terminate()
                raise
        output += printed
        (out / f"{name}.txt").write_text(output)
        if process.returncode:
            last = printed.strip().rpartition("\n")[2]
            return f"FAILED, exit code {process.returncode}: {last[:200]}"
    return f"ok, {time.perf_counter() - began:.0f} s. {figure(output, out / name)}{mfu(output)}"


def mfu(output: str) -> str:
    """Of what tools.bench printed: the share of the peak that the card's maker gives."""
    card = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    peaks = [peak for name, (peak, _) in GPUS.items() if name in card]
    eager = re.search(r"(\d+)% of (\S+) FLOP/s", output)
    compiled = re.search(r"its share: (\d+)%", output)
    if not (peaks and eager and compiled):
        return ""
    percent = float(eager[2]) / peaks[0]  # of the maker's peak, in one of ours
    return f"; MFU {int(eager[1]) * percent:.0f}% eager, {int(compiled[1]) * percent:.0f}% compiled"


def memory(config: str, knobs: list[str]) -> None:
    """Print the peak memory of two steps of a config, and the plan's."""
    c, plan = load_plan(load_config(config, knobs), missing=GPT2_VOCABULARY)
    print("| {} | {} |".format(*next(bench.measure(c, plan, repeats=1))))


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
        what = f"{Path(folder).name}, batch {rows}"
        print(f"| {what} | {100 * rows / seconds:,.0f} tokens/s |")


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("out/gpu_check"))
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="NAME,NAME")
    parser.add_argument("--nanogpt", type=os.path.abspath, metavar="CLONE")
    parser.add_argument("--generate", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--memory", metavar="CONFIG", help=argparse.SUPPRESS)
    args, knobs = parser.parse_known_args(argv)
    if args.generate:
        generate(args.generate)
        return 0
    if args.memory:
        memory(args.memory, knobs)
        return 0
    out = args.out.resolve()
    every, failed = checks(out, args.nanogpt), 0
    names = args.only or list(every)
    unknown = set(names) - every.keys()
    if unknown:
        parser.error(f"--only: no {', '.join(unknown)}; there are {', '.join(every)}")
    if not (torch.cuda.is_available() or any(knob.startswith("--device=") for knob in knobs)):
        parser.error("this torch finds no GPU; --device=cpu and small shapes try it without one")
    out.mkdir(parents=True, exist_ok=True)
    if "export" in names:  # which does not write over what it wrote before
        for name in EXPORTED:
            shutil.rmtree(out / name, ignore_errors=True)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{card}, torch {torch.__version__}\n\n| check | result |\n| --- | --- |", flush=True)
    for name in names:
        cell = check(name, every[name], knobs, out)
        failed += cell.startswith("FAILED")
        print(f"| {name} | {cell} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
