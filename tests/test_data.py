"""What data/ promises: tokens that give the text back, batches that are a function of (seed, step),
folders that appear as a whole, and one line for whatever is wrong."""

import base64
import errno
import gzip
import hashlib
import json
import lzma
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
import zlib
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import data.loader
import data.prepare
from data import DataError
from data.loader import TokenDataset, bigram_loss
from data.prepare import SHIPPED_CORPUS, is_validation, main, prepare, prepare_shipped
from data.tokenizer import END_OF_TEXT, SHIPPED_RANKS, encode_blocks, encode_bytes, load_tokenizer
from experiments.sotu.make import rank_file, train_tokenizer, training_texts

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "sotu"
    prepare_shipped(folder)
    return folder


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    return load_tokenizer("shipped")


@pytest.fixture(scope="module")
def speeches() -> list[dict]:
    return [json.loads(line) for line in lzma.open(SHIPPED_CORPUS)]


def token_folder(folder: Path, vocab_size: int = 1024, dtype: str = "uint16", **splits) -> Path:
    """A prepared folder written by hand: split name -> list of shards, each a list of ids."""
    folder.mkdir()
    meta = {"dtype": dtype, "vocab_size": vocab_size, "end_of_text": vocab_size - 1}
    meta["tokenizer"] = "shipped"
    for split, shards in splits.items():
        entries = []
        for i, tokens in enumerate(shards):
            content = np.array(tokens, np.dtype(dtype).newbyteorder("<")).tobytes()
            (folder / f"{split}_{i:03d}.bin").write_bytes(content)
            sha256 = hashlib.sha256(content).hexdigest()
            entry = {"file": f"{split}_{i:03d}.bin", "tokens": len(tokens), "sha256": sha256}
            entries.append(entry)
        total = sum(len(tokens) for tokens in shards)
        meta[split] = {"tokens": total, "bytes": 3 * total, "documents": 1, "shards": entries}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def read_tokens(folder: Path, split: str) -> list[int]:
    meta = json.loads((folder / "meta.json").read_text())
    dtype = {"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]]
    parts = [np.fromfile(folder / shard["file"], dtype) for shard in meta[split]["shards"]]
    return np.concatenate(parts).tolist()


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def edit_meta(folder: Path, change) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


# ---- tokenizer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"",
        bytes(range(256)),
        "naïve café — “quoted” ½ 日本語 🙂".encode(),
        "🙂".encode()[:3] + b" cut short",
        b"\xed\xa0\x80 an encoded surrogate \xf4\x90\x80\x80 and past U+10FFFF",
        b"\x00\xff" * 3000,
        b"x" * 100_000 + b"\xff" + b" " * 100_000 + b"\n" * 100_000,
        random.Random(0).randbytes(50_000),
    ],
    ids=["empty", "each byte", "unicode", "cut", "surrogate", "binary", "runs", "random"],
)
def test_any_bytes_survive_the_round_trip(encoding, text):
    assert encoding.decode_bytes(encode_bytes(encoding, text)) == text


def test_shipped_vocabulary_has_1024_entries_that_are_all_different(encoding):
    assert encoding.n_vocab == 1024
    assert encoding.encode_single_token(END_OF_TEXT) == 1023
    assert len({encoding.decode_single_token_bytes(i) for i in range(1024)}) == 1024


def test_cutting_into_blocks_changes_no_token(encoding, speeches):
    mixed = "".join(random.Random(1).choices("ab1.' \n\t\r é—", k=50_000))
    for text in [mixed, *(speech["text"] for speech in speeches[::40])]:
        assert len(list(encode_blocks(encoding, text.encode()))) > 1
        assert encode_bytes(encoding, text.encode()) == encoding.encode_ordinary(text)


@pytest.mark.parametrize("text", ["a", " ", "\n", "é", "_-", "\x1c-", "a\u0301"])
def test_no_text_gives_tiktoken_a_long_piece(text):
    class Recorder:
        def encode_ordinary(self, block: str) -> list[int]:
            lengths.append(len(block))
            return []

    lengths: list[int] = []
    list(encode_blocks(Recorder(), (text * 100_000).encode()))
    assert sum(lengths) == 100_000 * len(text) and max(lengths) <= 1024


def test_special_token_string_in_a_text_is_data(encoding, tmp_path):
    text = f"before {END_OF_TEXT} after"
    assert 1023 not in encode_bytes(encoding, text.encode())

    prepare([write_jsonl(tmp_path / "a.jsonl", [text] * 20)], "shipped", tmp_path / "out")
    tokens = read_tokens(tmp_path / "out", "train")
    assert tokens.count(1023) == TokenDataset(tmp_path / "out", "train", 8).documents == 19
    assert encoding.decode(tokens) == (text + END_OF_TEXT) * 19


def test_shipped_vocabulary_saw_training_speeches_only(speeches):
    pytest.importorskip("tokenizers")
    shipped = SHIPPED_RANKS.read_bytes()
    assert rank_file(train_tokenizer(training_texts(speeches))) == shipped
    assert rank_file(train_tokenizer([speech["text"] for speech in speeches])) != shipped


RANK_LINES = [b"%s %d" % (base64.b64encode(bytes([i])), i) for i in range(256)]


@pytest.mark.parametrize(
    "lines, problem",
    [
        (RANK_LINES[:100] + RANK_LINES[101:], "line 101: rank 100 should be here"),
        (RANK_LINES + [RANK_LINES[0].replace(b" 0", b" 256")], "line 257: this token again"),
        (RANK_LINES + [b"YWI= 255"], "line 257: rank 256 should be here"),
        (RANK_LINES[:255], "1 of the 256 single bytes"),
        (RANK_LINES + [b"not*base64 256"], "line 257: not"),
        (RANK_LINES + [b"\x80\x04\x95 pickled"], "line 257: not"),
        ([], "256 of the 256"),
    ],
)
def test_damaged_rank_file_is_refused_in_one_line(tmp_path, lines, problem):
    path = tmp_path / "ranks"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError) as error:
        load_tokenizer(str(path))
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_gpt2_without_a_network_says_how_to_supply_it(monkeypatch):
    def unreachable(name):
        raise ConnectionError("line one\nline two")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(DataError, match="TIKTOKEN_CACHE_DIR") as error:
        load_tokenizer("gpt2")
    assert "\n" not in str(error.value)


# ---- the shipped corpus and the split --------------------------------------------------------


def test_validation_is_whole_speeches_spread_over_both_centuries(shipped, encoding, speeches):
    held_out = [i for i in range(len(speeches)) if is_validation(i, 0.05)]
    assert np.diff(held_out).tolist() == [20] * 11
    assert speeches[held_out[0]]["year"] < 1800 and speeches[held_out[-1]]["year"] > 2000

    expected = "".join(speeches[i]["text"] + END_OF_TEXT for i in held_out)
    assert encoding.decode(read_tokens(shipped, "val")) == expected
    train, val = TokenDataset(shipped, "train", 128), TokenDataset(shipped, "val", 128)
    assert (train.documents, val.documents) == (237, 12)
    assert val.bytes == len(expected.replace(END_OF_TEXT, "").encode())
    assert val.bytes_per_token == val.bytes / len(read_tokens(shipped, "val"))
    assert 0.04 < val.bytes / (train.bytes + val.bytes) < 0.06


@pytest.mark.parametrize("fraction", [0.01, 0.05, 1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("items", [1, 7, 100, 12345])
def test_split_holds_out_the_fraction_rounded_and_evenly(fraction, items):
    held_out = [i for i in range(items) if is_validation(i, fraction)]
    assert len(held_out) == math.floor(items * fraction + 0.5)
    if len(held_out) > 1:
        assert np.ptp(np.diff(held_out)) <= 1


# ---- prepare ---------------------------------------------------------------------------------


def test_every_format_gives_the_same_tokens(tmp_path):
    text = "".join(f"Line {i} of a text.\n" for i in range(20_000)).encode()
    texts = {"a.txt": text, "a.txt.gz": gzip.compress(text), "a.TXT.xz": lzma.compress(text)}
    texts |= {"b.gz": gzip.compress(text), "b.xz": lzma.compress(text)}
    lines = b"".join(b'{"n": %d, "text": "Item %d"}\n' % (i, i) for i in range(50))
    lines = lines.replace(b'{"n": 7,', b'\n \n{"n": 7,')  # blank lines are no documents
    documents = {"c.jsonl": lines, "c.jsonl.gz": gzip.compress(lines)}
    documents |= {"c.jsonl.xz": lzma.compress(lines)}
    for files in (texts, documents):
        metas = []
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
            metas.append(prepare([tmp_path / name], "shipped", tmp_path / f"out-{name}"))
        assert all(meta == metas[0] for meta in metas)
    assert metas[0]["train"]["documents"] + metas[0]["val"]["documents"] == 50


def test_text_files_are_kept_to_the_byte_and_split_at_line_ends(tmp_path, encoding, monkeypatch):
    monkeypatch.setattr(data.prepare, "PART_BYTES", 100)
    lines = [b"%05d \xff\xc3 not UTF-8 \xe2\x80\x94 %d\r\n" % (i, i) for i in range(2000)]
    (tmp_path / "a.txt").write_bytes(b"".join(lines)[:-2])
    meta = prepare([tmp_path / "a.txt"], "shipped", tmp_path / "out")
    kept = {}
    for split in ("train", "val"):
        text = encoding.decode_bytes(read_tokens(tmp_path / "out", split))
        text = text.replace(END_OF_TEXT.encode(), b"")
        assert meta[split]["bytes"] == len(text)
        kept[split] = text.splitlines(keepends=True)
    assert sorted(kept["train"] + kept["val"]) == [*lines[:-1], lines[-1][:-2]]
    assert 0.04 < len(kept["val"]) / len(lines) < 0.06
    assert meta["train"]["documents"] + meta["val"]["documents"] == 1


def test_a_text_without_any_line_end_is_cut_all_the_same(tmp_path, encoding):
    text = "é".encode() * 500_000
    (tmp_path / "a.txt").write_bytes(text)
    meta = prepare([tmp_path / "a.txt"], "shipped", tmp_path / "out")
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == len(text)
    assert 0 < meta["val"]["bytes"] < len(text) / 10


def test_half_a_surrogate_pair_in_json_is_kept(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud83d"}\n' * 10)
    prepare([tmp_path / "a.jsonl"], "shipped", tmp_path / "out")
    text = encoding.decode_bytes(read_tokens(tmp_path / "out", "val"))
    assert text == b"x\xed\xa0\xbd" + END_OF_TEXT.encode()


def test_shards_and_batches_of_work_do_not_change_the_tokens(tmp_path, monkeypatch):
    texts = [f"Document {i}. " * (i % 7 + 1) for i in range(300)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    prepare([source], "shipped", tmp_path / "one")
    monkeypatch.setattr(data.prepare, "BATCH_BYTES", 100)
    meta = prepare([source], "shipped", tmp_path / "many", shard_tokens=500)
    for split in ("train", "val"):
        assert read_tokens(tmp_path / "one", split) == read_tokens(tmp_path / "many", split)
        sizes = [shard["tokens"] for shard in meta[split]["shards"]]
        assert set(sizes[:-1]) <= {500} and 0 < sizes[-1] <= 500
    assert len(meta["train"]["shards"]) > 2
    assert TokenDataset(tmp_path / "many", "train", 16).tokens == meta["train"]["tokens"]


def test_vocabulary_past_65536_gives_uint32(tmp_path):
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    tokens = [bytes([i]) for i in range(256)] + pairs
    lines = [b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)]
    (tmp_path / "ranks").write_bytes(b"".join(lines))
    source = write_jsonl(tmp_path / "a.jsonl", ["zz and more"] * 20)
    meta = prepare([source], str(tmp_path / "ranks"), tmp_path / "out")
    assert (meta["dtype"], meta["vocab_size"], meta["tokenizer"]) == ("uint32", 65793, "ranks")
    dataset = TokenDataset(tmp_path / "out", "train", 4)
    x, _ = dataset.batch(1, 4, seed=0)
    assert x.max() > 2**15
    encoding = load_tokenizer(dataset.tokenizer)  # the folder carries its vocabulary
    assert encoding.decode(read_tokens(tmp_path / "out", "val")) == "zz and more" + END_OF_TEXT


def test_the_reader_does_not_run_ahead_of_the_tokenizers(tmp_path, monkeypatch):
    """Of tokenizers that are as late as can be: they begin a batch when somebody waits for one."""
    read, encoded, ahead, wanted = 0, 0, [], threading.Semaphore(0)
    read_items, encode, result = data.prepare._read_items, data.prepare._encode, Future.result

    def wait_for_result(future, timeout=None):
        wanted.release()
        return result(future, timeout)

    def counting_read(paths, bar):
        nonlocal read
        for text, ends in read_items(paths, bar):
            read += len(text)
            ahead.append(read - encoded)
            yield text, ends

    def late_encode(encoding, batch):
        nonlocal encoded
        wanted.acquire()
        encoded += sum(len(text) for _, text, _ in batch)
        return encode(encoding, batch)

    monkeypatch.setattr(data.prepare, "_read_items", counting_read)
    monkeypatch.setattr(data.prepare, "_encode", late_encode)
    monkeypatch.setattr(Future, "result", wait_for_result)
    monkeypatch.setattr(data.prepare, "BATCH_BYTES", 1000)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    source = write_jsonl(tmp_path / "a.jsonl", ["A hundred bytes. " * 6] * 2000)
    prepare([source], "shipped", tmp_path / "out")
    assert read > 200_000 and max(ahead) < 6000


def test_overwrite_replaces_prepared_data_and_nothing_else(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", ["one"] * 20)
    second = write_jsonl(tmp_path / "b.jsonl", ["two"] * 30)
    out = tmp_path / "out"
    before = prepare([first], "shipped", out)
    with pytest.raises(DataError, match="--overwrite"):
        prepare([second], "shipped", out)
    with pytest.raises(DataError, match="no such file"):
        prepare([tmp_path / "missing.txt"], "shipped", out, overwrite=True)
    assert json.loads((out / "meta.json").read_text()) == before
    after = prepare([second], "shipped", out, overwrite=True)
    assert json.loads((out / "meta.json").read_text()) == after != before

    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="leaves it alone"):
        prepare([first], "shipped", out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work"
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl", "out"}


GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("missing.txt", None, "no such file"),
        ("a.parquet", b"PAR1", "should end in"),
        ("a.tar.gz", gzip.compress(b"x"), "should end in"),
        ("a.txt", b"", "no text"),
        ("a.jsonl", b'\n{"text": ""}\n', "no text"),
        ("a.txt", b"short", "give more text"),
        ("a.jsonl", GOOD * 3, "a fraction of at least 0.167"),
        ("a.jsonl", GOOD * 20 + b"{'text': 'single quotes'}\n", "line 21: should be"),
        ("a.jsonl", GOOD * 20 + b'\n{"body": "x"}\n', "line 22: should be"),
        ("a.jsonl", GOOD * 20 + b'{"text": 5}\n', "line 21: should be"),
        ("a.jsonl", GOOD * 20 + b"[" * 100_000 + b"\n", "line 21: should be"),
        ("a.jsonl", GOOD * 20 + b'{"text": "\xff"}\n', "line 21: should be"),
        ("a.txt.gz", gzip.compress(random.Random(0).randbytes(9999))[:-999], "to its end"),
        ("a.txt.gz", b"plain text", "to its end"),
        ("a.txt.xz", lzma.compress(b"text" * 999)[:-9], "to its end"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, capsys, name, content, problem):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    before = sorted(tmp_path.iterdir())
    command = ["--input", str(path), "--tokenizer", "shipped", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    stderr = capsys.readouterr().err
    assert problem in stderr and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ([], "--input"),
        (["--input", "a.txt", "--tokenizer", "gpt5", "--out", "out"], "gpt5"),
        (["--input", "a.txt", "--tokenizer", "shipped", "--out", "a.txt"], "--overwrite"),
        (["--input", "a.txt", "--tokenizer", "shipped", "--out", "a.txt", "--overwrite"], "alone"),
        (["--input", "a.txt", "--tokenizer", "shipped", "--out", "a.txt/out"], "a.txt"),
        *(
            (
                [
                    "--input",
                    "a.txt",
                    "--tokenizer",
                    "shipped",
                    "--out",
                    "out",
                    f"--val-fraction={f}",
                ],
                "--val-fraction",
            )
            for f in ("0", "1", "nan", "-0.1", "5%")
        ),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, monkeypatch, capsys, arguments, problem):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("A line.\n" * 100_000)
    assert main(arguments) == 2
    stderr = capsys.readouterr().err
    assert problem in stderr and stderr.count("\n") == 1
    assert os.listdir() == ["a.txt"]


def test_a_line_longer_than_memory_allows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data.prepare, "MAX_LINE_BYTES", 1000)
    (tmp_path / "bomb.jsonl.xz").write_bytes(lzma.compress(GOOD + b'{"text": "' + b"0" * 10**6))
    with pytest.raises(DataError, match="line 2: longer than 1,000 bytes"):
        prepare([tmp_path / "bomb.jsonl.xz"], "shipped", tmp_path / "out")


def test_a_line_of_megabytes_is_a_document_like_any_other(tmp_path, encoding):
    text = "A line of many bytes, and no end to it. " * 50_000
    meta = prepare(
        [write_jsonl(tmp_path / "a.jsonl", [text, "b"] * 2)], "shipped", tmp_path / "o", 0.5
    )
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == 2 * len(text) + 2
    tokens = read_tokens(tmp_path / "o", "train") + read_tokens(tmp_path / "o", "val")
    assert encoding.decode(tokens).count(text) == 2


def test_an_archive_that_asks_for_gigabytes_is_refused_in_one_line(tmp_path):
    """An .xz of a few bytes that names a dictionary of 4 GiB, under a limit of 3 GiB."""
    content = bytearray(lzma.compress(b"A line.\n" * 50_000))
    content[16] = 40  # the block header, from byte 12: size, flags, filter, size, dictionary; CRC
    size = (content[12] + 1) * 4
    crc = zlib.crc32(content[12 : 12 + size - 4])
    content[12 + size - 4 : 12 + size] = crc.to_bytes(4, "little")
    (tmp_path / "a.txt.xz").write_bytes(content)
    script = (
        "import resource, sys, data.prepare as p; "
        "resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30)); sys.exit(p.main("
        "['--input', sys.argv[1], '--tokenizer', 'shipped', '--out', sys.argv[2]]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a.txt.xz"), str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "a.txt.xz: cannot be read to its end" in result.stderr
    assert os.listdir(tmp_path) == ["a.txt.xz"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = write_jsonl(tmp_path / "a.jsonl", ["some text"] * 40)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="cannot be written: No space left"):
        prepare([source], "shipped", tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("moment", ["_encode", "_publish"])
def test_killed_preparation_leaves_nothing_that_looks_finished(tmp_path, moment):
    source = write_jsonl(tmp_path / "a.jsonl", ["some text"] * 40)
    out = tmp_path / "out"
    script = (
        "import os, signal, sys; from pathlib import Path; import data.prepare as p; "
        f"p.{moment} = lambda *a: os.kill(os.getpid(), signal.SIGKILL); "
        "p.prepare([Path(sys.argv[1])], 'shipped', Path(sys.argv[2]))"
    )
    killed = subprocess.run([sys.executable, "-c", script, source, out], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists() and len(list(tmp_path.glob(".out.tmp-*"))) == 1
    prepare([source], "shipped", out)  # and the next one cleans up
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]
    assert TokenDataset(out, "train", 8).documents == 38


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_process_that_finishes_second_does_not_fail(tmp_path, monkeypatch, overwrite):
    source = write_jsonl(tmp_path / "a.jsonl", ["some text"] * 40)
    out = tmp_path / "out"
    publish = data.prepare._publish

    def publish_after_the_other(temporary, *arguments):
        shutil.copytree(temporary, out)
        publish(temporary, *arguments)

    monkeypatch.setattr(data.prepare, "_publish", publish_after_the_other)
    prepare([source], "shipped", out, overwrite=overwrite)
    assert TokenDataset(out, "train", 8).documents == 38
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_a_process_that_finishes_second_with_other_data_says_so(tmp_path, monkeypatch):
    first = write_jsonl(tmp_path / "a.jsonl", ["some text"] * 40)
    second = write_jsonl(tmp_path / "b.jsonl", ["other text"] * 40)
    publish = data.prepare._publish

    def publish_after_the_other(*arguments):
        monkeypatch.setattr(data.prepare, "_publish", publish)
        prepare([first], "shipped", tmp_path / "out")
        publish(*arguments)

    monkeypatch.setattr(data.prepare, "_publish", publish_after_the_other)
    with pytest.raises(DataError, match="another process"):
        prepare([second], "shipped", tmp_path / "out")


def test_two_processes_that_start_together_make_one_good_folder(tmp_path):
    out = tmp_path / "out"
    script = "import sys, data.prepare; data.prepare.prepare_shipped(sys.argv[1])"
    command = [sys.executable, "-c", script, str(out)]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert TokenDataset(out, "val", 128).documents == 12
    prepare_shipped(out)  # and a third that finds it made is content


# ---- batches ---------------------------------------------------------------------------------

T = 16


@pytest.fixture
def counting(tmp_path) -> TokenDataset:
    """Two shards, [0, 1000) and [1000, 1500): a token says where it stands."""
    shards = [range(1000), range(1000, 1500)]
    return TokenDataset(token_folder(tmp_path / "counting", 2000, train=shards), "train", T)


def epoch_starts(dataset: TokenDataset, epoch: int, seed: int = 0) -> list[int]:
    """The first token of each window of an epoch, in order, with a batch size that divides none."""
    n = dataset.windows_per_epoch
    first, last = epoch * n, (epoch + 1) * n  # rows, over all steps
    steps = range(first // 7 + 1, (last - 1) // 7 + 2)
    rows = torch.cat([dataset.batch(step, 7, seed)[0][:, 0] for step in steps])
    return rows[first % 7 :][:n].tolist()


def test_batch_is_a_pure_function_of_seed_and_step(counting):
    again = TokenDataset(counting.data_dir, "train", T)
    expected = {step: counting.batch(step, 8, seed=3) for step in range(1, 41)}
    for step in random.Random(0).sample(range(1, 41), 40):
        x, y = again.batch(step, 8, seed=3)
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (8, T)
        assert torch.equal(x, expected[step][0]) and torch.equal(y, expected[step][1])
        assert torch.equal(y, x + 1)
    assert not torch.equal(counting.batch(1, 8, seed=4)[0], expected[1][0])
    assert not torch.equal(counting.batch(1, 8, seed=-3)[0], expected[1][0])


def test_a_batch_of_a_vast_corpus_reads_its_own_windows_and_nothing_else(tmp_path, monkeypatch):
    folder = token_folder(tmp_path / "vast", 2000, train=[range(100)] * 300)  # more than stay open
    size, meta = 2**28, json.loads((folder / "meta.json").read_text())
    for shard in meta["train"]["shards"]:
        os.truncate(folder / shard["file"], 2 * size)  # sparse: takes no room
        shard["tokens"] = size
    meta["train"]["tokens"] = 300 * size
    (folder / "meta.json").write_text(json.dumps(meta))
    dataset, reads = TokenDataset(folder, "train", T), []
    read = dataset._read
    monkeypatch.setattr(dataset, "_read", lambda *a: reads.append(a) or read(*a))
    for step in (1, 10**6, 10**12):
        dataset.batch(step, 400, seed=1)
    assert len(reads) == 3 * 400 and {count for _, _, count in reads} == {T + 1}
    assert len({shard for shard, _, _ in reads}) > 256
    if os.path.isdir("/proc/self/fd"):
        assert len(os.listdir("/proc/self/fd")) < 400


def test_a_shard_that_shrinks_while_in_use_is_named(counting):
    path = counting.data_dir / "train_000.bin"
    os.truncate(path, 0)
    with pytest.raises(DataError, match=f"{path}.*shorter"):
        [counting.batch(step, 8, seed=3) for step in range(1, 20)]


def test_each_window_comes_once_per_epoch_also_when_batches_straddle_epochs(counting):
    assert counting.windows_per_epoch == (1000 - T) // T + (500 - T) // T
    for epoch in range(5):
        starts = sorted(epoch_starts(counting, epoch))
        assert len(starts) == counting.windows_per_epoch
        gaps = np.diff(starts)
        assert (gaps >= T).all()  # no token is an input twice ...
        assert (gaps > T).sum() <= 1  # ... and none is left out but around the shards' ends
        assert starts[0] < 2 * T and 1500 - starts[-1] <= 3 * T


def test_every_epoch_has_a_new_order_and_a_new_offset(counting):
    orders = [epoch_starts(counting, epoch) for epoch in range(10)]
    ranks = {tuple(np.argsort(order).tolist()) for order in orders}
    assert len(ranks) == 10
    assert len({min(order) for order in orders}) > 5
    for order in orders:  # shuffled, not merely rotated
        assert abs(np.corrcoef(order, range(len(order)))[0, 1]) < 0.35
        assert (np.diff(order) == T).mean() < 0.1
    assert epoch_starts(counting, 0, seed=1) != orders[0]


@pytest.mark.parametrize("size", [T + 1, T + 5, 2 * T, 2 * T + 1, 3 * T - 1, 50, 100])
def test_every_start_position_is_reached(tmp_path, size):
    dataset = TokenDataset(token_folder(tmp_path / "d", train=[range(size)]), "train", T)
    x = torch.cat([dataset.batch(step, 50, seed=0)[0] for step in range(1, 41)])
    assert set(x[:, 0].tolist()) == set(range(size - T))


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_sees_the_same_global_batch(counting, world_size):
    for step in (1, 9, 12345):
        whole = counting.batch(step, 8, seed=5)
        parts = [counting.batch(step, 8, 5, rank, world_size) for rank in range(world_size)]
        for i in (0, 1):
            assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])


def test_windows_never_cross_a_shard(tmp_path):
    sizes = [40, 5, 17, 16, 300, 1]  # some too small for a window of 17
    shards = [[i] * size for i, size in enumerate(sizes)]
    dataset = TokenDataset(token_folder(tmp_path / "d", train=shards), "train", T)
    rows = [torch.cat(dataset.batch(step, 10, seed=0), dim=1) for step in range(1, 51)]
    rows = torch.cat(rows)
    assert (rows == rows[:, :1]).all()
    assert set(rows[:, 0].tolist()) == {0, 2, 4}


def test_two_trillion_tokens_cost_no_more_memory_or_work(tmp_path):
    folder = tmp_path / "huge"
    folder.mkdir()
    size = 2**28
    names = [f"train_{i:03d}.bin" for i in range(7451)]
    with (folder / names[0]).open("wb") as file:
        file.truncate(2 * size)  # a hole: takes no space
    for name in names[1:]:
        os.link(folder / names[0], folder / name)
    shards = [{"file": name, "tokens": size, "sha256": "0" * 64} for name in names]
    counts = {"tokens": size * 7451, "bytes": 1, "documents": 0, "shards": shards}
    meta = {"dtype": "uint16", "vocab_size": 1024, "end_of_text": 1023, "tokenizer": "shipped"}
    (folder / "meta.json").write_text(json.dumps(meta | {"train": counts}))

    handles = Path("/proc/self/fd")
    before = len(os.listdir(handles)) if handles.exists() else 0
    dataset = TokenDataset(folder, "train", 1024)
    assert dataset.tokens > 2e12
    dataset.batch(1, 64, seed=0)
    tracemalloc.start()
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    for step in range(10**6, 10**9, 10**8):
        assert dataset.batch(step, 64, seed=0)[0].shape == (64, 1024)
    sys.setprofile(None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert calls < 40_000  # a few dozen per row; one per shard and batch would be 75,000
    assert peak < 10e6
    if handles.exists():
        assert len(os.listdir(handles)) - before < 400


# ---- evaluation and the baseline -------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_in_order_predicts_every_token_but_a_shards_first_once(tmp_path, batch_size):
    sizes = [5 * T + 1, 70, 1, 2, T + 1, T, 3 * T]
    ends = np.cumsum(sizes).tolist()
    shards = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    dataset = TokenDataset(token_folder(tmp_path / "d", val=shards), "val", T)
    targets = []
    for x, y in dataset.in_order(batch_size):
        assert torch.equal(y, x + 1) and len(x) <= batch_size
        assert x.shape[1] == T or (len(x) == 1 and x.shape[1] < T)
        targets += y.flatten().tolist()
    assert targets == [token for shard in shards for token in list(shard)[1:]]


@pytest.mark.parametrize("cap, targets", [(1, T), (T, T), (5 * T + 3, 5 * T), (10**9, 999 + 499)])
def test_in_order_stops_at_whole_windows(counting, cap, targets):
    assert sum(y.numel() for _, y in counting.in_order(4, max_tokens=cap)) == targets


def oracle_bigram_loss(train: list[list[int]], val: list[list[int]], V: int) -> float:
    follows = [[0] * V for _ in range(V)]
    for shard in train:
        for a, b in zip(shard, shard[1:], strict=False):
            follows[a][b] += 1
    arrivals = [sum(follows[a][b] for a in range(V)) + 1 for b in range(V)]
    losses = []
    for strength in [2**k for k in range(17)]:
        total, n = 0.0, 0
        for shard in val:
            for a, b in zip(shard, shard[1:], strict=False):
                prior = strength * arrivals[b] / sum(arrivals)
                total -= math.log((follows[a][b] + prior) / (sum(follows[a]) + strength))
                n += 1
        losses.append(total / n)
    return min(losses)


@pytest.mark.parametrize("chunk", [1, 7, 2**22])
def test_bigram_loss_equals_the_formula_written_out(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(data.loader, "CHUNK_TOKENS", chunk)
    rng = random.Random(0)
    train = [[rng.choice([0, 1, 1, 2, 3]) for _ in range(n)] for n in (100, 40, 1)]
    val = [[rng.choice([0, 1, 2, 3, 4]) for _ in range(n)] for n in (30, 20)]  # 4 is new
    folder = token_folder(tmp_path / "d", vocab_size=6, train=train, val=val)
    loss = bigram_loss(TokenDataset(folder, "train", 4), TokenDataset(folder, "val", 4))
    assert loss == pytest.approx(oracle_bigram_loss(train, val, 6), rel=1e-12)


def test_bigram_loss_is_between_uniform_and_perfect_and_none_for_large_vocabularies(
    shipped, tmp_path
):
    loss = bigram_loss(TokenDataset(shipped, "train", 128), TokenDataset(shipped, "val", 128))
    assert 3.5 < loss < 4.0  # uniform: log(1024) = 6.93
    large = token_folder(tmp_path / "d", vocab_size=10_001, train=[range(99)], val=[range(99)])
    assert bigram_loss(TokenDataset(large, "train", 8), TokenDataset(large, "val", 8)) is None


# ---- what the loader refuses -----------------------------------------------------------------


def set_shard(key: str, value):
    return lambda folder: edit_meta(folder, lambda m: m["train"]["shards"][0].update({key: value}))


def set_meta(key: str, value):
    return lambda folder: edit_meta(folder, lambda meta: meta.update({key: value}))


def alter(folder: Path) -> None:
    content = bytearray((folder / "train_000.bin").read_bytes())
    content[50] ^= 1
    (folder / "train_000.bin").write_bytes(content)


def swap_splits(folder: Path) -> None:
    edit_meta(folder, lambda meta: meta.update(train=meta["val"], val=meta["train"]))


def swap_files(folder: Path) -> None:
    (folder / "train_000.bin").rename(folder / "aside.bin")
    (folder / "val_000.bin").rename(folder / "train_000.bin")
    (folder / "aside.bin").rename(folder / "val_000.bin")


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda folder: os.truncate(folder / "train_000.bin", 100), "has 100 bytes"),
        (lambda folder: (folder / "train_000.bin").open("ab").write(b"xx"), "has 402 bytes"),
        (alter, "altered"),
        (lambda folder: (folder / "train_000.bin").unlink(), "is missing"),
        (lambda folder: (folder / "meta.json").unlink(), "python -m data.prepare"),
        (lambda folder: (folder / "meta.json").write_bytes(b"\x80\x04\x95"), "cannot be read"),
        (lambda folder: (folder / "meta.json").write_text("[" * 100_000), "cannot be read"),
        (lambda folder: (folder / "meta.json").write_text('{"vocab": 65}'), "dtype"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "everything"),
        (set_meta("dtype", "uint32"), "bytes where"),
        (set_meta("dtype", "float64"), "dtype"),
        (set_meta("dtype", ["uint16"]), "dtype"),
        (set_meta("vocab_size", 70_000), "vocab_size"),
        (set_meta("vocab_size", True), "vocab_size"),
        (set_meta("vocab_size", "1024"), "vocab_size"),
        (set_meta("end_of_text", 1024), "end_of_text"),
        (set_meta("tokenizer", "/etc/passwd"), "tokenizer"),
        (set_meta("train", None), "train"),
        (set_meta("train", {"tokens": 200, "bytes": 0, "documents": 1, "shards": []}), "bytes"),
        (set_meta("train", {"tokens": -1, "bytes": 9, "documents": 1, "shards": []}), "tokens"),
        (set_meta("train", {"tokens": 5, "bytes": 9, "documents": 1, "shards": []}), "tokens"),
        (set_meta("train", {"tokens": 5, "bytes": 9, "documents": 1, "shards": [1]}), "shards"),
        (set_shard("file", "../outside.bin"), "shards[0].file"),
        (set_shard("file", "/etc/passwd"), "shards[0].file"),
        (set_shard("file", "val_000.bin"), "shards[0].file"),
        (set_shard("tokens", 199), "train.tokens"),
        (set_shard("sha256", 5), "sha256"),
        (swap_splits, "shards[0].file"),
        (swap_files, "has 200 bytes"),
    ],
)
def test_damaged_or_foreign_data_is_refused_in_one_line(tmp_path, damage, problem):
    folder = token_folder(tmp_path / "d", train=[range(200)], val=[range(100)])
    TokenDataset(folder, "train", T)
    damage(folder)
    with pytest.raises(DataError) as error:
        TokenDataset(folder, "train", T)
    assert problem in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(tmp_path))


def test_a_token_past_the_vocabulary_is_refused_before_the_model_sees_it(tmp_path):
    folder = token_folder(tmp_path / "d", vocab_size=50, train=[range(60)])
    dataset = TokenDataset(folder, "train", T)
    for read in (
        lambda: [dataset.batch(step, 8, seed=0) for step in range(1, 9)],
        lambda: list(dataset.in_order(4)),
        lambda: bigram_loss(dataset, dataset),
    ):
        with pytest.raises(DataError, match="vocabulary of 50"):
            read()


def test_splits_of_one_size_that_changed_places_are_refused(tmp_path):
    folder = token_folder(tmp_path / "d", train=[range(100)], val=[range(100, 200)])
    swap_files(folder)
    for split in ("train", "val"):
        with pytest.raises(DataError, match="altered"):
            TokenDataset(folder, split, T)


def test_one_token_is_no_split(tmp_path):
    folder = token_folder(tmp_path / "d", train=[[5]], val=[[5]])
    for split in ("train", "val"):
        with pytest.raises(DataError, match="has 1 tokens, fewer than one window"):
            TokenDataset(folder, split, 1)


def test_a_split_without_room_for_one_window_is_refused(tmp_path):
    folder = token_folder(tmp_path / "d", train=[range(T), range(T)], val=[range(T + 1)])
    assert TokenDataset(folder, "val", T).batch(1, 2, seed=0)[0].tolist() == [[*range(T)]] * 2
    with pytest.raises(DataError, match="give more text or a shorter context"):
        TokenDataset(folder, "train", T)
