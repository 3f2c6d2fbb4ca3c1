"""A trained model from which a run learns, too."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data.command import UserError
from data.loader import TokenDataset
from run.checkpoint import check_tokenizer, digest_of, load_model, load_weights
from run.config import Config, check_vocabulary
from run.machine import Machine


class Teacher:
    """A trained model, in `c.teacher`, that shows a run its distribution over the next token
    (1503.02531). It is never trained, pruned or saved. `digest`: of its shape and weights. Raises
    UserError, also where its tokens are not those of the data, text by text."""

    def __init__(self, c: Config, data: TokenDataset, machine: Machine):
        given = load_weights(Path(c.teacher))
        shape = replace(given["model_config"], context_length=c.context_length)
        check_vocabulary(c, "teacher", shape, data.vocab_size)
        if unknown := check_tokenizer(c, "teacher", given, data):
            raise UserError(unknown)
        self.model = load_model(given | {"model_config": shape}, machine.device).eval()
        self.model.requires_grad_(False)  # or autocast would keep a copy of each weight
        self.machine, self.weight = machine, c.teacher_weight
        self.digest = digest_of(shape, given["model"])

    @torch.no_grad()
    def targets(self, tokens: Tensor, came: Tensor) -> Tensor:
        """(B, T, vocab_size), float32: `teacher_weight` times the teacher's distribution over the
        next token, and the rest on the token that came. tokens, came: (B, T)."""
        with self.machine.autocast():
            logits = self.model(tokens)
        mixed = logits.float().softmax(-1) * self.weight
        rest = torch.full(came.shape, 1 - self.weight, device=came.device)
        return mixed.scatter_add_(-1, came[..., None], rest[..., None])
