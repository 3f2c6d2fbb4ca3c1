"""Weights to start from, as a checkpoint of step 0: normal, std 0.5 / sqrt(inputs), but 0 for the
matrices that write to the residual stream, and 0.02 for the embeddings.

python -m studies.optimizer.start CONFIG SEED FILE
python train.py CONFIG --seed=SEED --init_from=FILE
"""

import argparse
import json
import sys
from dataclasses import asdict

import torch
from torch import nn

from data import command
from model import GPT
from run.checkpoint import FORMAT
from run.config import load_config
from tools import load_plan


@command
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, kind in (("config", str), ("seed", int), ("file", str)):
        parser.add_argument(name, type=kind)
    args = parser.parse_args(argv)
    _, plan = load_plan(load_config(args.config))  # makes the shipped corpus, if it is missing
    torch.manual_seed(args.seed)
    model = GPT(plan.enlarged)
    for name, module in model.blocks.named_modules():
        if isinstance(module, nn.Linear):
            writes = name.endswith((".o", ".down"))
            nn.init.normal_(module.weight, std=0.0 if writes else 0.5 / module.in_features**0.5)
    saved = {"format": FORMAT, "config": "{}", "model_config": json.dumps(asdict(model.config))}
    saved |= {"step": 0, "model": dict(model.state_dict()), "optimizer": {}, "scores": {}}
    torch.save(saved, args.file)


if __name__ == "__main__":
    sys.exit(main())
