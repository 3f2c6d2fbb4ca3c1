"""Tokens give the text back, batches follow from (seed, step), folders are whole or not there."""

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
from data.tokenizer import END_OF_TEXT, encode_to_numpy, load_tokenizer

ENCODING = load_tokenizer("shipped")
T = 16
GOOD = b'{"text": "good"}\n' * 20
XZ = lzma.compress(GOOD)
BAD = [  # file, content, an argument
    ("a.csv", b"text", "--out=out"),
    ("a.jsonl", GOOD + b'{"body": "x"}\n', "--out=out"),
    ("a.txt.gz", gzip.compress(random.Random(0).randbytes(9999))[:-999], "--out=out"),
    ("a.jsonl.xz", XZ + XZ[:25] + b"!" + XZ[26:], "--out=out"),
    *[(f"a.jsonl.{kind}", b"", "--out=out") for kind in ("gz", "xz")],
    ("gpt5", b"", "--tokenizer=gpt5"),
    ("ranks", b"eA== 0\n", "--tokenizer=ranks"),
    ("tokenizer.json", b"{}", "--tokenizer=."),
    ("out", b"is there", "--out=out"),
    ("fraction", b"", "--val-fraction=nan"),
    *[("--val-fraction=0.05 would do", b"", f"--val-fraction={x}") for x in (0.02, 0.98)],
    ("a.txt", b"short", "--out=out"),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A rank file with all bytes and all pairs of bytes."""
    tokens = [bytes([i]) for i in range(256)]
    tokens += [a + b for a in tokens for b in tokens]
    lines = [b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)]
    (path := tmp_path_factory.mktemp("ranks") / "pairs").write_bytes(b"".join(lines))
    return path


def by_hand(folder: Path, *shards, vocab_size: int = 2000) -> TokenDataset:
    """The dataset of a prepared folder written by hand. shards: each a list of ids."""
    train = {"tokens": sum(map(len, shards)), "bytes": 0, "shards": []}
    for i, tokens in enumerate(shards):
        (folder / f"{i}.bin").write_bytes(content := np.array(tokens, "<u2").tobytes())
        sha256 = hashlib.sha256(content).hexdigest()
        train["shards"].append({"file": f"{i}.bin", "tokens": len(tokens), "sha256": sha256})
    meta = {"dtype": "uint16", "vocab_size": vocab_size, "end_of_text": 0, "tokenizer": "none"}
    (folder / "meta.json").write_text(json.dumps(meta | {"files": {}, "train": train}))
    return TokenDataset(folder, "train", T)


def read_tokens(folder: Path, split: str) -> list[int]:
    meta = json.loads((folder / "meta.json").read_text())
    parts = [np.fromfile(folder / shard["file"], meta["dtype"]) for shard in meta[split]["shards"]]
    return np.concatenate(parts).tolist()


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("\n \n".join(json.dumps({"text": text}) for text in texts))  # with blank lines
    return path


def test_any_bytes_survive_the_round_trip_and_blocks_change_no_token(pairs):
    for text in (
        b"",
        "naïve café — “quoted” ½ 日本語 🙂".encode() + "🙂".encode()[:3] + b" cut short",
        b"\xed\xa0\x80 an encoded surrogate \xf4\x90\x80\x80 and past U+10FFFF",
        b"x" * 100_000 + b"\xff" + b" " * 100_000 + b"\n" * 100_000 + b"\x1c-" * 100_000,
        random.Random(0).randbytes(50_000),
    ):
        assert ENCODING.decode_bytes(encode_to_numpy(ENCODING, text).tolist()) == text
    mixed = "".join(random.Random(1).choices("ab1.'     \n\t\r é—", k=50_000))
    for encoding in (ENCODING, load_tokenizer(str(pairs))):
        tokens = encode_to_numpy(encoding, mixed.encode())
        assert tokens.tolist() == encoding.encode_ordinary(mixed)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 1 / 3, 0.5, 0.9])
def test_a_split_holds_out_the_fraction_rounded_and_evenly(fraction):
    for items in (1, 7, 100, 12345):
        held_out = [i for i in range(items) if is_validation(i, fraction)]
        assert len(held_out) == int(items * fraction + 0.5)
        assert len(held_out) < 2 or np.ptp(np.diff(held_out)) <= 1
    for items in (1, 7):  # of many small tasks
        held_out = [is_validation(i, fraction, task) for task in range(1000) for i in range(items)]
        assert abs(sum(held_out) - 1000 * items * fraction) < 5


def test_documents_come_back_from_several_processes(tmp_path, monkeypatch, pairs):
    monkeypatch.setattr("data.prepare.TASK_BYTES", 1)  # each file is a task
    texts = [f"before {END_OF_TEXT} after", "half a pair \ud83d", "é" * 9] * 20
    files = [write_jsonl(tmp_path / name, texts) for name in ("a.jsonl", "b.jsonl")]
    meta = prepare(files, str(pairs), out := tmp_path / "out")
    for split, held_out in (("train", False), ("val", True)):
        dataset, tokens = TokenDataset(out, split, 4), read_tokens(out, split)
        each = [(x, is_validation(i, 0.05, task)) for task in (0, 1) for i, x in enumerate(texts)]
        kept = [text.encode("utf-8", "surrogatepass") for text, val in each if val == held_out]
        encoding = load_tokenizer(dataset.tokenizer)
        documents = [[*encode_to_numpy(encoding, text), encoding.eot_token] for text in kept]
        assert tokens == sum(documents, []) and meta[split]["documents"] == len(kept)
        assert dataset.bytes_per_target(len(tokens)) == sum(map(len, kept)) / len(tokens)
        targets = torch.cat([y.flatten() for _, y in dataset.in_order(3, 20)]).tolist()
        text = encoding.decode_bytes([token for token in targets if token != encoding.eot_token])
        assert dataset.bytes_per_target(20) == len(text) / len(targets)
        assert len(meta[split]["shards"]) == 2  # of two tasks
    assert (meta["dtype"], Path(dataset.tokenizer).parent) == ("uint32", out)  # its own tokenizer


@pytest.mark.parametrize("name", ["a.txt", "a.TXT.gz", "a.txt.XZ"])
def test_text_is_kept_to_the_byte_and_split_at_line_ends(tmp_path, monkeypatch, name):
    pack = {"t": bytes, "z": gzip.compress, "Z": lzma.compress}[name[-1]]
    monkeypatch.setattr("data.text.PART_BYTES", 100)
    lines = [b"%05d \xff\xc3 not UTF-8 \xe2\x80\x94 %d\r\n" % (i, i) for i in range(2000)]
    text = b"".join(lines)[:-2]
    (tmp_path / name).write_bytes(pack(text[:999]) + pack(text[999:]))  # as several streams
    meta = prepare([tmp_path / name], "shipped", out := tmp_path / "out")
    train, val = (ENCODING.decode_bytes(read_tokens(out, split)) for split in ("train", "val"))
    assert train.endswith(end := END_OF_TEXT.encode()) and (train + val).count(end) == 1
    assert meta["train"]["bytes"] + len(end) == len(train) and meta["val"]["bytes"] == len(val)
    kept = train.removesuffix(end).splitlines(keepends=True) + val.splitlines(keepends=True)
    assert sorted(kept) == [*lines[:-1], lines[-1][:-2]]


@pytest.mark.parametrize("name, content, argument", BAD)
def test_bad_input_leaves_nothing(tmp_path, monkeypatch, refused, name, content, argument):
    if argument == "--tokenizer=.":
        pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_bytes(GOOD)
    Path(name).write_bytes(content)
    source = name if name.startswith("a.") else "a.jsonl"
    refused(name, "--tokenizer=shipped", "--out=out", "--input", source, argument, main=main)
    assert Path(name).read_bytes() == content
    assert sorted(os.listdir()) == sorted({"a.jsonl", name})


@pytest.mark.parametrize("module, way", [("matplotlib", "-extra.txt"), ("_lzma", "of Python")])
def test_a_missing_module_is_named_with_the_way_to_get_it(module, way, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    refused(f"{way}\n", main=command(lambda argv: __import__(module)))


def test_a_text_without_line_ends_is_not_cut_inside_a_character(tmp_path, monkeypatch):
    monkeypatch.setattr("data.text.PART_BYTES", 5)
    for text in [b"\x80" * 500, *(b"x" * n + "é日🙂".encode() * 50 for n in range(5))]:
        (tmp_path / "a.txt").write_bytes(text)
        parts = [part for part, _ in read_items(tmp_path / "a.txt", "text")]
        assert b"".join(parts) == text and max(map(len, parts)) <= 13
        assert text[0] == 0x80 or all(part.decode() for part in parts)


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few users make links")
def test_each_file_is_read_once_and_what_is_left_out_is_named(tmp_path, monkeypatch, capsys):
    for folder in (inside := tmp_path / "in", outside := tmp_path / "else"):
        (folder / "locked").mkdir(parents=True)
        write_jsonl(folder / "a.jsonl", ["some text"] * 10)
        write_jsonl(folder / "._a.jsonl", ["what macOS leaves"])
    (inside / "again.jsonl").symlink_to(inside / "a.jsonl")
    (inside / "other.jsonl").symlink_to(outside / "a.jsonl")
    (inside / "folder").symlink_to(outside)
    (inside / "gone.txt").symlink_to(tmp_path / "gone")
    (inside / "b.json").touch()
    os.mkfifo(inside / "pipe.txt")
    monkeypatch.setattr("os.access", lambda path, _: path.name != "locked")  # root may read all
    meta = prepare([inside, inside / "a.jsonl"], "shipped", tmp_path / "out")
    assert meta["train"]["documents"] + meta["val"]["documents"] == 20
    left_out = [str(inside / x) for x in ("b.json", "folder", "gone.txt", "locked", "pipe.txt")]
    assert capsys.readouterr().err == f"left out: 5 in {inside}, such as {', '.join(left_out)}\n"


def test_parquet_gives_the_bytes_of_jsonl(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (folder := tmp_path / "in" / "deeper").mkdir(parents=True)
    texts = [None if i % 9 == 0 else f"Text {i}. é " * 20 for i in range(2000)]
    lines = [json.dumps({"id": 1, "body": text}).encode() + b"\n" for text in texts[1000:]]
    table = pa.table({"id": range(1000), "body": texts[:1000], "words": [["a"]] * 1000})
    parquet.write_table(table, folder / "a.parquet", row_group_size=300)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    plain = write_jsonl(tmp_path / "plain.jsonl", [text for text in texts if text])
    expected = prepare([plain], "shipped", tmp_path / "plain")
    assert prepare([tmp_path / "in"], "shipped", tmp_path / "out", key="body") == expected
    for key, words in (("text", "column text; .*body"), ("id", "int64"), ("words", "list")):
        with pytest.raises(UserError, match=f"a.parquet: .*{words}"):
            prepare([folder / "a.parquet"], "shipped", tmp_path / "other", key=key)


def test_a_preparation_leaves_a_whole_folder_or_nothing(tmp_path, monkeypatch):
    source, out = write_jsonl(tmp_path / "a.jsonl", ["some text"] * 40), tmp_path / "out"
    for step in ("data.prepare.encode_to_numpy", "os.rename"):  # the first, the last
        with monkeypatch.context() as patched, pytest.raises(UserError, match="out: .*No space"):
            patched.setattr(step, Mock(side_effect=OSError(28, "No space left")))
            prepare([source], "shipped", out)
        assert os.listdir(tmp_path) == ["a.jsonl"]
    prepare([source], "shipped", out)
    with pytest.raises(UserError, match="out: exists"):
        prepare([source], "shipped", out)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signal to one process")
@pytest.mark.parametrize("number", ["SIGKILL", "SIGINT"])
def test_a_worker_ends_with_the_main_process(number):
    code = r"""if True:
        import sys, data.prepare as p
        work = "import os, time; os.write(1, b'at work\\n'); time.sleep(600)"
        sys.exit(p.command(lambda argv: p.make_all(exec, [work, work]))())"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes) as main:
        assert main.stdout.readline() == "at work\n"
        main.send_signal(getattr(signal, number))
        error = main.communicate(timeout=100)[1]  # once all have ended, who hold the pipes
        assert error == "stopped\n" or number == "SIGKILL"


def test_the_shipped_tokens_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = TokenDataset("data/sotu", "train", 128)
    assert os.listdir("data") == ["sotu"]
    content = torch.cat(dataset.batch(step=1234, batch_size=16, seed=1)).numpy().tobytes()
    assert hashlib.sha256(content).hexdigest().startswith("a9f3cecfb3043b87")
    assert dataset.digest.startswith("6fa350581e94b11d")  # of all files and their tokenizer


@pytest.fixture
def counting(tmp_path) -> TokenDataset:
    """Two shards of use and two too small for a window. A token says where it stands."""
    shards = [range(1000), range(1100, 1105), range(1200, 1700), range(1800, 1800 + T)]
    return by_hand(tmp_path, *shards)


def test_a_batch_follows_from_seed_and_step_and_is_shared_by_ranks(counting):
    again = TokenDataset(counting.data_dir, "train", T)
    expected = {step: counting.batch(step, 8, seed=3)[0] for step in range(1, 41)}
    for step in random.Random(0).sample(range(1, 41), 40):
        x, y = again.batch(step, 8, seed=3)
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (8, T)
        assert torch.equal(x, expected[step]) and torch.equal(y, x + 1)  # so it is of one shard
        for n in (2, 4, 8):
            parts = [again.batch(step, 8, 3, rank, n) for rank in range(n)]
            assert all(map(torch.equal, map(torch.cat, zip(*parts)), (x, y)))
    assert not torch.equal(counting.batch(1, 8, seed=-3)[0], expected[1])


def test_each_epoch_has_each_window_once_in_a_new_order(counting):
    n = counting.windows_per_epoch
    assert n == (1000 - T) // T + (500 - T) // T and n % 8  # some batches are of two epochs
    rows = torch.cat([counting.batch(step, 8, seed=0)[0][:, 0] for step in range(1, 200)])
    orders = rows[: 10 * n].view(10, n).tolist()  # the first token of each window
    for order in orders:
        gaps = np.diff(sorted(order))
        assert (gaps >= T).all() and (gaps > T).sum() <= 1  # each token once, but at shards' ends
        assert min(order) < 2 * T and 1700 - max(order) <= 3 * T
        assert abs(np.corrcoef(order, range(n))[0, 1]) < 0.35  # shuffled, not merely rotated
    assert len({tuple(np.argsort(order).tolist()) for order in orders}) == 10


@pytest.mark.parametrize("size", [T + 1, 2 * T, 2 * T + 1, 5 * T + 7])
def test_every_token_but_the_last_ones_may_begin_a_window(tmp_path, size):
    dataset = by_hand(tmp_path, range(size))
    x = torch.cat([dataset.batch(step, 99, seed=0)[0] for step in range(1, 41)])
    assert set(x[:, 0].tolist()) == set(range(size - T))


def test_in_order_predicts_every_token_but_a_shards_first_once(tmp_path):
    ends = np.cumsum([0, 5 * T + 1, 70, 1, 2, T + 1, T, 3 * T]).tolist()
    shards = [range(start, end) for start, end in zip(ends, ends[1:])]
    dataset = by_hand(tmp_path, *shards)
    for rows in (1, 3, 100):
        targets = []
        for x, y in dataset.in_order(rows):
            assert torch.equal(y, x + 1) and len(x) <= rows
            assert x.shape[1] == T or (len(x) == 1 and x.shape[1] < T)
            targets += y.flatten().tolist()
        assert targets == [token for shard in shards for token in list(shard)[1:]]
    for cap, n in ((1, T), (T, T), (4 * T + 3, 4 * T), (10**9, len(targets))):  # whole windows
        assert sum(y.numel() for _, y in dataset.in_order(4, max_tokens=cap)) == n


def test_damaged_data_is_refused_before_a_model_sees_it(counting, tmp_path):
    for file, content in (("0.bin", bytes(100)), ("0.bin", bytes(2000)), ("meta.json", b"{}")):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(UserError, match=r"\A.*python -m data.prepare\Z"):
            TokenDataset(tmp_path, "train", T)
    dataset = by_hand(tmp_path, range(60), vocab_size=50)
    with pytest.raises(UserError, match="vocabulary of 50"):
        list(dataset.in_order(8))
    os.truncate(tmp_path / "0.bin", 0)
    with pytest.raises(UserError, match="0.bin"):
        dataset.batch(1, 64, seed=3)
