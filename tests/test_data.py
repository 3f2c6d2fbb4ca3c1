"""Tokens give the text back, and batches follow from (seed, step)."""

import base64
import gzip
import hashlib
import json
import lzma
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import ROOT

from data.command import UserError, command
from data.loader import TokenDataset
from data.prepare import is_validation, main, prepare
from data.text import read_items
from data.tokenizer import (
    END_OF_TEXT,
    encode_to_numpy,
    load_tokenizer,
    tokenizer_digest,
)

ENCODING = load_tokenizer("shipped")
T = 16
GOOD = b'{"text": "good"}\n' * 20
XZ = lzma.compress(GOOD)
BAD_FILES = {
    "a.csv": b"text",
    "a.jsonl": GOOD + b'{"body": "x"}\n',
    "a.txt.gz": gzip.compress(random.Random(0).randbytes(9999))[:-999],
    "a.jsonl.xz": XZ + XZ[:25] + b"!" + XZ[26:],
    "a.jsonl.gz": b"",
    "b.jsonl.xz": b"",
    "a.txt": b"short",
}
BAD_ARGUMENTS = {  # the argument -> a word of the error
    "--tokenizer=gpt5": "gpt5",
    "--tokenizer=ranks": "ranks",
    "--tokenizer=.": "tokenizer",  # perhaps only because its package is missing
    "--out=ranks": "ranks: exists",
    "--val-fraction=nan": "fraction",
    "--val-fraction=0.02": "--val-fraction=0.05 would do",
    "--val-fraction=0.98": "--val-fraction=0.05 would do",
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A rank file with all bytes and all pairs of bytes."""
    tokens = [bytes([i]) for i in range(256)]
    for first in range(256):
        tokens += [bytes([first, second]) for second in range(256)]
    path = tmp_path_factory.mktemp("ranks") / "pairs"
    with path.open("wb") as file:
        for rank, token in enumerate(tokens):
            file.write(b"%s %d\n" % (base64.b64encode(token), rank))
    return path


def by_hand(folder: Path, *shards, vocab_size: int = 2000) -> TokenDataset:
    """A dataset whose shards hold these token ids."""
    entries = []
    for i, tokens in enumerate(shards):
        content = np.array(tokens, "<u2").tobytes()
        (folder / f"{i}.bin").write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        entries.append({"file": f"{i}.bin", "tokens": len(tokens), "sha256": sha256})
    meta = {
        "dtype": "uint16",
        "vocab_size": vocab_size,
        "tokenizer": "none",
        "files": {},
        "train": {"tokens": sum(map(len, shards)), "bytes": 0, "shards": entries},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return TokenDataset(folder, "train", T)


def read_tokens(folder: Path, split: str) -> list[int]:
    meta = json.loads((folder / "meta.json").read_text())
    tokens = []
    for shard in meta[split]["shards"]:
        tokens += np.fromfile(folder / shard["file"], meta["dtype"]).tolist()
    return tokens


def write_jsonl(path: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text("\n \n".join(lines))  # with blank lines
    return path


@pytest.mark.parametrize(
    "text",
    [
        b"",
        "naïve café “quoted” 日本語 🙂".encode() + "🙂".encode()[:3] + b" cut short",
        b"\xed\xa0\x80 an encoded surrogate \xf4\x90\x80\x80 and past U+10FFFF",
        b"x" * 100_000 + b"\xff" + b" " * 100_000 + b"\n" * 100_000 + b"\x1c-" * 99_999,
        random.Random(0).randbytes(50_000),
    ],
    ids=range(5),
)
def test_any_bytes_survive_the_round_trip(text):
    assert ENCODING.decode_bytes(encode_to_numpy(ENCODING, text).tolist()) == text


def test_blocks_change_no_token(pairs):
    mixed = "".join(random.Random(1).choices("ab1.'     \n\t\r é—", k=50_000))
    for encoding in (ENCODING, load_tokenizer(str(pairs))):
        tokens = encode_to_numpy(encoding, mixed.encode())
        assert tokens.tolist() == encoding.encode_ordinary(mixed)


def test_a_copy_of_a_tokenizer_has_its_digest(tmp_path, pairs):
    source = write_jsonl(tmp_path / "a.jsonl", ["some text"] * 40)
    digests = []
    for tokenizer in ("shipped", str(pairs)):
        folder = tmp_path / f"of {Path(tokenizer).name}"
        prepare([source], tokenizer, folder)
        digest = tokenizer_digest(tokenizer)
        assert TokenDataset(folder, "train", 4).tokenizer_digest == digest
        assert tokenizer_digest(str(folder / "tokenizer.tiktoken")) == digest
        digests.append(digest)
    digests.append(tokenizer_digest("gpt2"))  # by its name, without a download
    assert len(set(digests)) == 3


@pytest.mark.parametrize("fraction", [0.01, 0.05, 1 / 3, 0.5, 0.9])
def test_a_split_holds_out_the_fraction_evenly(fraction):
    for items in (1, 7, 100, 12345):
        held_out = [i for i in range(items) if is_validation(i, fraction)]
        assert len(held_out) == int(items * fraction + 0.5)
        assert len(held_out) < 2 or np.ptp(np.diff(held_out)) <= 1
    for items in (1, 7):  # in each of many small tasks
        held_out = 0
        for task in range(1000):
            held_out += sum(is_validation(i, fraction, task) for i in range(items))
        assert abs(held_out - 1000 * items * fraction) < 5


def test_documents_come_back_from_several_processes(tmp_path, monkeypatch, pairs):
    monkeypatch.setattr("data.prepare.TASK_BYTES", 1)  # each file is a task
    texts = [f"before {END_OF_TEXT} after", "half a pair \ud83d", "é" * 9] * 20
    files = [write_jsonl(tmp_path / name, texts) for name in ("a.jsonl", "b.jsonl")]
    out = tmp_path / "out"
    meta = prepare(files, str(pairs), out)
    assert meta["dtype"] == "uint32"
    encoding = load_tokenizer(str(out / "tokenizer.tiktoken"))

    expected = {"train": [], "val": []}
    text_bytes = {"train": 0, "val": 0}
    for task in (0, 1):
        for i, text in enumerate(texts):
            split = "val" if is_validation(i, 0.05, task) else "train"
            content = text.encode("utf-8", "surrogatepass")
            expected[split] += encode_to_numpy(encoding, content).tolist()
            expected[split].append(encoding.eot_token)
            text_bytes[split] += len(content)
    for split, tokens in expected.items():
        assert read_tokens(out, split) == tokens
        assert len(meta[split]["shards"]) == 2
        assert meta[split]["documents"] == tokens.count(encoding.eot_token)
        dataset = TokenDataset(out, split, 4)
        assert Path(dataset.tokenizer).parent == out  # a copy of its own
        mean = text_bytes[split] / len(tokens)
        assert dataset.bytes_per_target(len(tokens)) == mean
        targets = [t for t in tokens[1:21] if t != encoding.eot_token]
        first_bytes = len(encoding.decode_bytes(targets))
        assert dataset.bytes_per_target(20) == first_bytes / 20


@pytest.mark.parametrize("name", ["a.txt", "a.TXT.gz", "a.txt.XZ"])
def test_text_is_kept_to_the_byte_and_split_at_line_ends(tmp_path, monkeypatch, name):
    pack = {"t": bytes, "z": gzip.compress, "Z": lzma.compress}[name[-1]]
    monkeypatch.setattr("data.text.PART_BYTES", 100)
    lines = [b"%05d \xff\xc3 not UTF-8 \xe2\x80\x94\r\n" % i for i in range(2000)]
    lines.append(b"without a line end")
    text = b"".join(lines)
    source = tmp_path / name
    source.write_bytes(pack(text[:999]) + pack(text[999:]))  # as several streams
    meta = prepare([source], "shipped", tmp_path / "out")
    train = ENCODING.decode_bytes(read_tokens(tmp_path / "out", "train"))
    val = ENCODING.decode_bytes(read_tokens(tmp_path / "out", "val"))
    end = END_OF_TEXT.encode()
    assert train.endswith(end)
    assert (train + val).count(end) == 1
    train = train.removesuffix(end)
    assert meta["train"]["bytes"] == len(train)
    assert meta["val"]["bytes"] == len(val)
    kept = train.splitlines(keepends=True) + val.splitlines(keepends=True)
    assert sorted(kept) == sorted(lines)


def test_text_without_line_ends_is_not_cut_inside_a_character(tmp_path, monkeypatch):
    monkeypatch.setattr("data.text.PART_BYTES", 5)
    source = tmp_path / "a.txt"
    for n in range(5):
        text = b"x" * n + "é日🙂".encode() * 50
        source.write_bytes(text)
        parts = [part.decode() for part, _ in read_items(source, "text")]
        assert "".join(parts).encode() == text
        assert max(map(len, parts)) <= 13
    source.write_bytes(b"\x80" * 500)  # no character begins here
    parts = [part for part, _ in read_items(source, "text")]
    assert b"".join(parts) == b"\x80" * 500
    assert max(map(len, parts)) <= 13


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_leaves_nothing(tmp_path, monkeypatch, refused, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(BAD_FILES[name])
    refused(name, "--tokenizer=shipped", "--out=out", "--input", name, main=main)
    assert os.listdir() == [name]
    assert Path(name).read_bytes() == BAD_FILES[name]


@pytest.mark.parametrize("argument", BAD_ARGUMENTS)
def test_a_bad_argument_leaves_nothing(tmp_path, monkeypatch, refused, argument):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_bytes(GOOD)
    Path("ranks").write_bytes(b"eA== 0\n")
    given = ("--input=a.jsonl", "--tokenizer=shipped", "--out=out", argument)
    refused(BAD_ARGUMENTS[argument], *given, main=main)
    assert sorted(os.listdir()) == ["a.jsonl", "ranks"]
    assert Path("a.jsonl").read_bytes() == GOOD
    assert Path("ranks").read_bytes() == b"eA== 0\n"


MISSING = {"matplotlib": "-extra.txt", "_lzma": "of Python"}


@pytest.mark.parametrize("module, advice", MISSING.items())
def test_a_missing_module_is_named(module, advice, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    refused(f"{advice}\n", main=command(lambda argv: __import__(module)))


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few users make links")
def test_each_file_is_read_once_and_others_named(tmp_path, monkeypatch, capsys):
    inside = tmp_path / "in"
    outside = tmp_path / "else"
    (inside / "locked").mkdir(parents=True)
    outside.mkdir()
    write_jsonl(inside / "a.jsonl", ["some text"] * 10)
    write_jsonl(outside / "a.jsonl", ["some text"] * 10)
    write_jsonl(inside / "._a.jsonl", ["what macOS leaves"])
    (inside / "again.jsonl").symlink_to(inside / "a.jsonl")
    (inside / "other.jsonl").symlink_to(outside / "a.jsonl")
    (inside / "folder").symlink_to(outside)
    (inside / "missing.txt").symlink_to(tmp_path / "missing")
    (inside / "b.json").touch()
    os.mkfifo(inside / "pipe.txt")
    # Root may read every folder, so we pretend that this one is locked.
    monkeypatch.setattr("os.access", lambda path, _: path.name != "locked")
    meta = prepare([inside, inside / "a.jsonl"], "shipped", tmp_path / "out")
    assert meta["train"]["documents"] + meta["val"]["documents"] == 20
    names = ("b.json", "folder", "locked", "missing.txt", "pipe.txt")
    skipped = ", ".join(str(inside / name) for name in names)
    assert f"left out: 5 in {inside}, such as {skipped}\n" == capsys.readouterr().err


def test_parquet_gives_the_bytes_of_jsonl(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [None if i % 9 == 0 else f"Text {i}. é " * 20 for i in range(2000)]
    folder = tmp_path / "in" / "deeper"
    folder.mkdir(parents=True)
    columns = {"id": range(1000), "body": texts[:1000], "words": [["a"]] * 1000}
    table = pyarrow.table(columns)
    parquet.write_table(table, folder / "a.parquet", row_group_size=300)
    lines = [json.dumps({"id": 1, "body": text}) + "\n" for text in texts[1000:]]
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    plain = write_jsonl(tmp_path / "plain.jsonl", [text for text in texts if text])
    expected = prepare([plain], "shipped", tmp_path / "plain")
    meta = prepare([tmp_path / "in"], "shipped", tmp_path / "out", key="body")
    assert meta == expected
    source = [folder / "a.parquet"]
    wrong_keys = {"text": "column text; .*body", "id": "int64", "words": "list"}
    for key, words in wrong_keys.items():
        with pytest.raises(UserError, match=f"a.parquet: .*{words}"):
            prepare(source, "shipped", tmp_path / "other", key=key)


@pytest.mark.parametrize("step", ["data.prepare.encode_to_numpy", "os.rename"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, step):
    source = write_jsonl(tmp_path / "a.jsonl", ["some text"] * 40)
    monkeypatch.setattr(step, Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(UserError, match="out: .*No space"):
        prepare([source], "shipped", tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_folder_that_exists_is_refused_and_stays(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["some text"] * 40)
    prepare([source], "shipped", tmp_path / "out")
    before = read_tokens(tmp_path / "out", "train")
    with pytest.raises(UserError, match="out: exists"):
        prepare([source], "shipped", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]
    assert read_tokens(tmp_path / "out", "train") == before


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signal to one process")
@pytest.mark.parametrize("number", [signal.SIGINT, getattr(signal, "SIGKILL", 9)])
def test_a_worker_ends_with_the_main_process(number):
    code = r"""if True:
        import sys, data.prepare as p
        work = "import os, time; os.write(1, b'at work\\n'); time.sleep(600)"
        sys.exit(p.command(lambda argv: p.make_all(exec, [work, work]))())"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    python = [sys.executable, "-c", code]
    with subprocess.Popen(python, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "at work\n"
        process.send_signal(number)
        # This returns once every process has ended that holds the pipes.
        _, error = process.communicate(timeout=100)
    if number == signal.SIGINT:
        assert error == "stopped\n"


def test_the_shipped_tokens_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = TokenDataset("data/sotu", "train", 128)
    assert os.listdir("data") == ["sotu"]
    batch = torch.cat(dataset.batch(step=1234, batch_size=16, seed=1))
    sha256 = hashlib.sha256(batch.numpy().tobytes()).hexdigest()
    assert sha256.startswith("a9f3cecfb3043b87")
    assert dataset.digest.startswith("6fa350581e94b11d")  # of meta.json


@pytest.fixture
def counting(tmp_path) -> TokenDataset:
    """Two long shards and two that are too short. A token says where it stands."""
    shards = [range(1000), range(1100, 1105), range(1200, 1700), range(1800, 1800 + T)]
    return by_hand(tmp_path, *shards)


def test_a_batch_follows_from_seed_and_step_and_is_shared_by_ranks(counting):
    again = TokenDataset(counting.data_dir, "train", T)
    expected = [counting.batch(step, 8, seed=3)[0] for step in range(1, 41)]
    for step in random.Random(0).sample(range(1, 41), 40):
        x, y = again.batch(step, 8, seed=3)
        assert x.dtype == y.dtype == torch.int64
        assert x.shape == (8, T)
        assert torch.equal(x, expected[step - 1])
        assert torch.equal(y, x + 1)  # because a window lies in one shard
        for ranks in (2, 4, 8):
            rows = 8 // ranks
            for rank in range(ranks):
                part = slice(rank * rows, (rank + 1) * rows)
                inputs, targets = again.batch(step, 8, 3, rank, ranks)
                assert torch.equal(inputs, x[part])
                assert torch.equal(targets, y[part])
    assert not torch.equal(counting.batch(1, 8, seed=-3)[0], expected[0])


def test_each_epoch_has_each_window_once_in_a_new_order(counting):
    n = counting.windows_per_epoch
    assert n == (1000 - T) // T + (500 - T) // T
    assert n % 8  # so a few batches have windows of two epochs
    batches = [counting.batch(step, 8, seed=0)[0] for step in range(1, 200)]
    first_tokens = torch.cat(batches)[:, 0]
    orders = first_tokens[: 10 * n].view(10, n).tolist()
    for order in orders:
        gaps = np.diff(sorted(order))
        assert (gaps >= T).all()
        assert (gaps > T).sum() <= 1  # between the two shards
        assert min(order) < 2 * T
        assert 1700 - max(order) <= 3 * T
        correlation = np.corrcoef(order, range(n))[0, 1]
        assert abs(correlation) < 0.35  # shuffled, not merely rotated
    assert len({tuple(np.argsort(order).tolist()) for order in orders}) == 10


@pytest.mark.parametrize("size", [T + 1, 2 * T, 2 * T + 1, 5 * T + 7])
def test_every_token_but_the_last_ones_may_begin_a_window(tmp_path, size):
    dataset = by_hand(tmp_path, range(size))
    x = torch.cat([dataset.batch(step, 99, seed=0)[0] for step in range(1, 41)])
    assert set(x[:, 0].tolist()) == set(range(size - T))


def test_in_order_predicts_every_token_but_a_shards_first_once(tmp_path):
    shards = []
    expected = []
    for size in (5 * T + 1, 70, 1, 2, T + 1, T, 3 * T):
        start = 100 * len(shards)
        shard = range(start, start + size)
        shards.append(shard)
        expected += shard[1:]
    dataset = by_hand(tmp_path, *shards)
    for rows in (1, 3, 100):
        targets = []
        for x, y in dataset.in_order(rows):
            assert torch.equal(y, x + 1)
            assert len(x) <= rows
            assert x.shape[1] == T or (len(x) == 1 and x.shape[1] < T)
            targets += y.flatten().tolist()
        assert targets == expected
    counts = {1: T, T: T, 4 * T + 3: 4 * T, 10**9: len(expected)}
    for max_tokens, count in counts.items():
        batches = dataset.in_order(4, max_tokens)
        assert sum(y.numel() for _, y in batches) == count


@pytest.mark.parametrize(
    "file, content",
    [("0.bin", bytes(100)), ("0.bin", bytes(2000)), ("meta.json", b"{}")],
)
def test_a_damaged_file_is_refused(counting, file, content):
    (counting.data_dir / file).write_bytes(content)
    with pytest.raises(UserError, match=r"\A.*python -m data.prepare\Z"):
        TokenDataset(counting.data_dir, "train", T)


def test_bad_tokens_are_refused_before_a_model_sees_them(tmp_path):
    dataset = by_hand(tmp_path, range(60), vocab_size=50)
    with pytest.raises(UserError, match="vocabulary of 50"):
        list(dataset.in_order(8))
    os.truncate(tmp_path / "0.bin", 0)
    with pytest.raises(UserError, match="0.bin"):
        dataset.batch(1, 64, seed=3)
