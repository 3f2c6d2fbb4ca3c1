"""Weights to start from, as a checkpoint of step 0: normal, std 0.5 / sqrt(inputs), but 0 for the
matrices that write to the residual stream, and 0.02 for the embeddings.

python -m studies.optimizer.start CONFIG SEED FILE
python train.py CONFIG --seed=SEED --init_from=FILE
"""

import json
import sys
from dataclasses import asdict

import torch
from torch import nn

from data.loader import TokenDataset
from model import GPT
from run.checkpoint import FORMAT
from run.config import enlarged_shape, load_config


def main(config: str, seed: str, file: str) -> None:
    c = load_config(config)
    torch.manual_seed(int(seed))
    vocab_size = TokenDataset(c.data_dir, "train", c.context_length).vocab_size
    model = GPT(enlarged_shape(c, vocab_size))
    for name, module in model.blocks.named_modules():
        if isinstance(module, nn.Linear):
            writes = name.endswith((".o", ".down"))
            nn.init.normal_(module.weight, std=0.0 if writes else 0.5 / module.in_features**0.5)
    saved = {"format": FORMAT, "config": "{}", "model_config": json.dumps(asdict(model.config))}
    saved |= {"step": 0, "model": dict(model.state_dict()), "optimizer": {}, "scores": {}}
    torch.save(saved, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
