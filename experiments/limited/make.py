"""A part of prepared data: documents of its training split, drawn at random, up to a number of
tokens (the last document is cut). A larger part holds the smaller ones. Validation stays as it is.

python -m experiments.limited.make data/sotu --tokens=172512 --to=data/sotu_3
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np

from data.loader import TokenDataset
from data.prepare import prepare_shipped
from tools import command


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path, help="made by data.prepare")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--to", type=Path, required=True, help="the folder to make")
    args = parser.parse_args(argv)
    prepare_shipped(str(args.folder))
    train = TokenDataset(args.folder, "train", 1)
    meta = json.loads((args.folder / "meta.json").read_text())
    if meta["dtype"] != "uint16" or len(meta["train"]["shards"]) > 1:
        parser.error(f"{args.folder}: must have one shard of uint16")
    tokens = np.fromfile(args.folder / "train_000.bin", np.uint16)
    ends = (tokens == train.end_of_text).nonzero()[0] + 1
    documents = np.split(tokens, ends[:-1])
    order = np.random.default_rng(0).permutation(len(documents))
    part = np.concatenate([documents[i] for i in order])[: args.tokens]

    shutil.copytree(args.folder, args.to)
    count = int((part == train.end_of_text).sum())
    size = round(len(part) * train.bytes / train.tokens)  # about
    (args.to / "train_000.bin").write_bytes(part)
    shard = {"file": "train_000.bin", "tokens": len(part)}
    shard["sha256"] = hashlib.sha256(part).hexdigest()
    counts = {"tokens": len(part), "bytes": size, "documents": count}
    meta["train"] = counts | {"shards": [shard]}
    (args.to / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    print(f"{args.to}: {len(part):,} tokens of {train.tokens:,}, {count:,} documents")


if __name__ == "__main__":
    sys.exit(main())
