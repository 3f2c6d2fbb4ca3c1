"""Ids and logits of RUN.gguf in llama.cpp, and of RUN in ours: -m studies.gguf.compare RUN ...

Needs the package llama-cpp-python. Ids are those of 1,000 lines from all over the shipped corpus
and of four odd ones; logits those of ten lines, at every position.
"""

import json
import lzma
import sys
from itertools import product
from pathlib import Path

import torch

from data.prepare import SHIPPED_CORPUS
from tools.load import load_trained

ODD = ["  two  spaces\n\n\tand\r\n", "I'LL don't 1234567 x²", "<|endoftext|>", "漢字 😀"]


@torch.no_grad()
def compare(run: str, texts: list[str], kind: int) -> dict:
    """kind: of the numbers in llama.cpp's cache of keys and values, 0 float32 or 1 float16."""
    from llama_cpp import Llama

    trained, options = load_trained(Path(run)), {"type_k": kind, "type_v": kind, "verbose": False}
    model, T = trained.model.cpu(), trained.model.config.context_length
    llama = Llama(f"{run}.gguf", n_ctx=0, logits_all=True, **options)
    ids = [llama.tokenize(text.encode(), add_bos=False) for text in texts]
    ours = [trained.tokenizer.encode_ordinary(text) for text in texts]
    pairs = []  # llama.cpp's logits and ours, each (T, vocab_size)
    for tokens in (tokens[:T] for tokens in ids[:1000:100]):
        llama.reset()
        llama.eval(tokens)
        logits = model(torch.tensor([tokens]))[0, :, : trained.vocab_size]
        pairs.append((torch.tensor(llama.scores[: len(tokens)]), logits))
    found = {"lines": len(ids), "equal_ids": sum(a == b for a, b in zip(ids, ours))}
    found["positions"] = sum(len(a) for a, b in pairs)
    found["equal_choices"] = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    found["largest_difference"] = max((a - b).abs().max().item() for a, b in pairs)
    last = [(a[-1], b[-1], a[-1].topk(3).indices.tolist()) for a, b in pairs]
    found["last_logits"] = [[(i, a[i].item(), b[i].item()) for i in top] for a, b, top in last]
    return found | {"ids": [[text, ids[texts.index(text)]] for text in ODD]}


if __name__ == "__main__":
    speeches = map(json.loads, lzma.decompress(SHIPPED_CORPUS.read_bytes()).splitlines())
    lines = [line for speech in speeches for line in speech["text"].split("\n") if line.strip()]
    for run, kind in product(sys.argv[1:], (0, 1)):
        found = compare(run, lines[:: len(lines) // 1000][:1000] + ODD, kind)
        print(json.dumps({"run": run, "cache": ("float32", "float16")[kind]} | found))
