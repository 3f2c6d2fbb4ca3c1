"""Begin the runs of a seed, shared steps once: python -m studies.window.forks SEED

Arms that prune are one run until the first of them scores. So that run, `oneshot_75`, is trained
once; every arm gets a copy of its checkpoint and log, with the arm's own knobs, as if it had been
saved in RUNS/ARM/SEED. Small models begin there, too, because tools.compare has no weights by seed.
It lets all of them go on (when.sh). What is there is not made again.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

from run.checkpoint import NAME
from run.config import NOT_SAVED, load_config
from studies.optimizer import start
from tools.compare import TRAIN, read_arms

RUNS = Path("out/when")
# Trunk -> the steps after which arms leave it. Scoring begins 34 steps before a window
FORKS = {
    "oneshot_75": {
        1000: ["idea_10_35"],
        3000: ["oneshot_25"],
        7000: ["idea_50_75", "oneshot_50"],
        9000: ["oneshot_625", "oneshot_75"],
    },
    "scratch": {1000: ["scratch"]},
    "scratch_flops_10_35": {1000: ["scratch_flops_10_35"]},
}


def fork(trunk: Path, out_dir: Path, config: str, knobs: list[str]) -> None:
    """Copy the run in `trunk` to `out_dir`, as one of this config."""
    c = {k: v for k, v in vars(load_config(config, knobs)).items() if k not in NOT_SAVED}
    saved = torch.load(trunk / NAME, weights_only=True)
    saved["config"] = json.dumps(c)
    out_dir.mkdir(parents=True)
    torch.save(saved, out_dir / NAME)
    (out_dir / "log.jsonl").write_bytes((trunk / "log.jsonl").read_bytes())
    (out_dir / "config.json").write_text(json.dumps(c | {"out_dir": str(out_dir)}))


def main(seed: str) -> None:
    for trunk, leave in FORKS.items():
        arms = read_arms("studies/window/arms.py")[1]
        config, knobs = arms[trunk]
        folder, weights = RUNS / "trunks" / trunk / seed, RUNS / f"trunks/{trunk}/{seed}.pt"
        weights.parent.mkdir(parents=True, exist_ok=True)
        shape = "scratch" if trunk.startswith("scratch") else "idea"
        start.main([f"configs/lab/{shape}.py", seed, str(weights)])
        for step, names in leave.items():
            todo = [name for name in names if not (RUNS / name / seed).exists()]
            if not todo:
                continue
            own = [f"--seed={seed}", f"--init_from={weights}", f"--out_dir={folder}", "--resume"]
            command = [sys.executable, TRAIN, config, *knobs, *own, f"--stop_after={step}"]
            subprocess.run([*command, "--compile=on"], check=True)
            for name in todo:
                fork(folder, RUNS / name / seed, arms[name][0], [*arms[name][1], f"--seed={seed}"])


if __name__ == "__main__":
    main(*sys.argv[1:])
