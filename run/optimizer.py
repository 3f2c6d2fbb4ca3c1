"""The optimizers of a run: AdamW, and Muon (Jordan et al., 2024) for matrices."""

import torch

from model import GPT
from run.config import Config


def make_optimizers(model: GPT, c: Config) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or Muon for the matrices of the blocks and AdamW for the rest. Only
    matrices have weight decay."""
    by_muon = [p for p in model.blocks.parameters() if p.dim() >= 2 and c.optimizer == "muon"]
    muon = set(by_muon)
    others = [p for p in model.parameters() if p not in muon]
    matrices, vectors = [p for p in others if p.dim() >= 2], [p for p in others if p.dim() < 2]
    lr, decay = c.learning_rate, c.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(c.beta1, c.beta2), fused=True)
    if not by_muon:
        return [adamw]
    # Updates have the usual size of AdamW's (2502.16982), so that one learning rate fits both
    match = "match_rms_adamw"
    return [torch.optim.Muon(by_muon, lr, weight_decay=decay, adjust_lr_fn=match), adamw]
