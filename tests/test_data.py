"""What data/ promises: tokens that give the text back, batches that are a function of (seed, step),
folders that appear as a whole, and one line for whatever is wrong."""

import base64
import contextlib
import gzip
import hashlib
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import refused

import data.prepare
import data.text
from data import DataError
from data.bigram import bigram_loss
from data.loader import TokenDataset
from data.prepare import SHIPPED_CORPUS, is_validation, main, prepare
from data.text import read_items
from data.tokenizer import _BLOCK, END_OF_TEXT, SHIPPED_RANKS, encode_bytes, load_tokenizer

ROOT = Path(__file__).parent.parent
TOKEN_BYTES = "token_bytes.bin"
ENCODING = load_tokenizer("shipped")
with lzma.open(SHIPPED_CORPUS) as corpus:
    SPEECHES = [json.loads(line) for line in corpus]
T = 16


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A rank file with all bytes and all pairs of bytes."""
    tokens = [bytes([i]) for i in range(256)]
    tokens += [a + b for a in tokens for b in tokens]
    lines = [b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)]
    (path := tmp_path_factory.mktemp("ranks") / "pairs").write_bytes(b"".join(lines))
    return path


def token_folder(folder: Path, vocab_size: int = 1024, **splits) -> Path:
    """A prepared folder written by hand: split name -> list of shards, each a list of ids."""

    def write(file: str, numbers) -> str:
        content = np.array(numbers, "<u2").tobytes()
        (folder / file).write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    folder.mkdir()
    meta = {"dtype": "uint16", "vocab_size": vocab_size, "end_of_text": vocab_size - 1}
    meta |= {"tokenizer": "none", "files": {TOKEN_BYTES: write(TOKEN_BYTES, [3] * vocab_size)}}
    for split, shards in splits.items():
        total = sum(map(len, shards))
        entries = [{"file": f"{split}_{i:03d}.bin"} for i in range(len(shards))]
        for entry, tokens in zip(entries, shards):
            entry |= {"tokens": len(tokens), "sha256": write(entry["file"], tokens)}
        meta[split] = {"tokens": total, "bytes": 3 * total, "documents": 1, "shards": entries}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def read_tokens(folder: Path, split: str) -> list[int]:
    meta = json.loads((folder / "meta.json").read_text())
    parts = [np.fromfile(folder / shard["file"], meta["dtype"]) for shard in meta[split]["shards"]]
    return np.concatenate(parts).tolist()


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """With blank lines, which are no documents."""
    path.write_text("\n \n".join(json.dumps({"text": text}) for text in texts))
    return path


def test_any_bytes_survive_the_round_trip_in_blocks_of_bounded_size():
    for text in (
        b"",
        "naïve café — “quoted” ½ 日本語 🙂".encode() + "🙂".encode()[:3] + b" cut short",
        b"\xed\xa0\x80 an encoded surrogate \xf4\x90\x80\x80 and past U+10FFFF",
        b"x" * 100_000 + b"\xff" + b" " * 100_000 + b"\n" * 100_000 + b"\x1c-" * 100_000,
        random.Random(0).randbytes(50_000),
    ):
        assert ENCODING.decode_bytes(encode_bytes(ENCODING, text)) == text
        blocks = _BLOCK.finditer(text.decode("utf-8", "surrogateescape"))
        assert all(len(block.group()) <= 2**16 for block in blocks)


def test_cutting_into_blocks_changes_no_token(pairs):
    mixed = "".join(random.Random(1).choices("ab1.'     \n\t\r é—", k=50_000))
    for encoding in (ENCODING, load_tokenizer(str(pairs))):
        for text in [mixed, *(speech["text"] for speech in SPEECHES[::40])]:
            assert len(text) > 1024
            assert encode_bytes(encoding, text.encode()) == encoding.encode_ordinary(text)


@pytest.mark.parametrize("ranks", [[*range(256), 257], range(255)], ids=len)
def test_a_rank_file_in_which_some_text_has_no_tokens_is_refused(tmp_path, ranks):
    tokens = [*(bytes([byte]) for byte in range(256)), b"ab"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in zip(tokens, ranks)]
    (tmp_path / "ranks").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"\A.*no gap in its ranks.*\Z"):
        load_tokenizer(str(tmp_path / "ranks"))


@pytest.mark.parametrize(
    "config, last, words",
    [
        ([1], 1, "cannot read its"),
        ({"eos_token": ["</s>"]}, 1, "nothing ends a text"),
        ({"eos_token": 1}, 1, "nothing ends a text"),
        ({"eos_token": {"id": 1}}, 1, "cannot read its"),
        ({"eos_token": "</s>"}, 4_000_000_000, "token id of 4,000,000,000"),
    ],
)
def test_an_odd_hugging_face_tokenizer_is_refused_in_one_line(tmp_path, config, last, words):
    pytest.importorskip("tokenizers")
    model = {"type": "WordLevel", "vocab": {"1": 0, "</s>": last}, "unk_token": "1"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=rf"\A.*{words}.*\Z"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("fraction", [0.01, 0.05, 1 / 3, 0.5, 0.9])
def test_a_split_holds_out_the_fraction_rounded_and_evenly(fraction):
    for items in (1, 7, 100, 12345):
        held_out = [i for i in range(items) if is_validation(i, fraction)]
        assert len(held_out) == int(items * fraction + 0.5)
        assert len(held_out) < 2 or np.ptp(np.diff(held_out)) <= 1


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_tasks(monkeypatch):
    """Each file is a task, and they are done one after the other."""
    monkeypatch.setattr(data.prepare, "TASK_BYTES", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 1)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_documents_come_back_however_the_work_is_cut(tmp_path, small_tasks, pairs, dtype):
    tokenizer = {"uint16": "shipped", "uint32": str(pairs)}[dtype]
    texts = [f"before {END_OF_TEXT} after", "half a pair \ud83d", "é" * 9] * 20
    files = [write_jsonl(tmp_path / name, texts) for name in ("a.jsonl", "b.jsonl")]
    meta = prepare(files, tokenizer, out := tmp_path / "out", shard_tokens=150)
    for split, held_out in (("train", False), ("val", True)):
        dataset, tokens = TokenDataset(out, split, 4), read_tokens(out, split)
        kept = [text for i, text in enumerate(texts) if is_validation(i, 0.05) == held_out]
        kept = [text.encode("utf-8", "surrogatepass") for text in kept * 2]
        encoding = load_tokenizer(dataset.tokenizer)
        documents = [[*encode_bytes(encoding, text), encoding.eot_token] for text in kept]
        assert tokens == sum(documents, []) and meta[split]["documents"] == len(kept)
        assert dataset.bytes_per_target(len(tokens)) == sum(map(len, kept)) / len(tokens)
        targets = torch.cat([y.flatten() for _, y in dataset.in_order(3, 20)]).tolist()
        text = encoding.decode_bytes([token for token in targets if token != encoding.eot_token])
        assert dataset.bytes_per_target(20) == len(text) / len(targets)
        *full, last = [shard["tokens"] for shard in meta[split]["shards"]]
        assert set(full) <= {150} and 0 < last <= 150
    assert len(meta["train"]["shards"]) > 2 and meta["dtype"] == dtype
    assert Path(dataset.tokenizer).parent == out  # prepared data keeps its tokenizer


@pytest.mark.parametrize("name", ["a.txt", "a.TXT.gz", "a.txt.XZ"])
def test_text_is_kept_to_the_byte_and_split_at_line_ends(tmp_path, monkeypatch, name):
    pack = {"t": bytes, "z": gzip.compress, "Z": lzma.compress}[name[-1]]
    monkeypatch.setattr(data.text, "PART_BYTES", 100)
    lines = [b"%05d \xff\xc3 not UTF-8 \xe2\x80\x94 %d\r\n" % (i, i) for i in range(2000)]
    (tmp_path / name).write_bytes(pack(b"".join(lines)[:-2]))
    meta = prepare([tmp_path / name], "shipped", out := tmp_path / "out")
    train, val = (ENCODING.decode_bytes(read_tokens(out, split)) for split in ("train", "val"))
    assert train.endswith(end := END_OF_TEXT.encode()) and (train + val).count(end) == 1
    train = train.removesuffix(end)
    assert (meta["train"]["bytes"], meta["val"]["bytes"]) == (len(train), len(val))
    kept, held_out = train.splitlines(keepends=True), val.splitlines(keepends=True)
    assert sorted(kept + held_out) == [*lines[:-1], lines[-1][:-2]]
    assert (meta["train"]["documents"], meta["val"]["documents"]) == (1, 0)


def test_a_text_without_line_ends_is_not_cut_inside_a_character(tmp_path, monkeypatch):
    monkeypatch.setattr(data.text, "PART_BYTES", 5)
    for text in [b"\x80" * 500, *(b"x" * n + "é日🙂".encode() * 50 for n in range(5))]:
        (tmp_path / "a.txt").write_bytes(text)
        parts = [part for part, _, _ in read_items(tmp_path / "a.txt", "text")]
        assert b"".join(parts) == text and max(map(len, parts)) <= 13
        assert text[0] == 0x80 or all(part.decode() for part in parts)


GOOD = b'{"text": "good"}\n' * 20
BAD = [  # file, content, words of the message or a wrong argument
    ("a.csv", b"text", "a.csv: no such file, or none that ends in one of .txt"),
    ("a.jsonl", GOOD[:50], "give more text, or another fraction"),
    ("a.jsonl", GOOD + b'\n{"body": "x"}\n', "line 22: should be"),
    ("a.txt.gz", gzip.compress(random.Random(0).randbytes(9999))[:-999], "to its end"),
    ("a.txt.gz", gzip.compress(b"")[:10] + b"\xff" * 99, "to its end"),
    ("a.txt.xz", b"plain text", "to its end"),
    ("a.jsonl", GOOD, "--input=missing.txt"),
    ("a.jsonl", GOOD, "--input=*.parquet"),
    ("a.jsonl", GOOD, "--input="),  # not the current folder
    ("a.jsonl", GOOD, "--key=body"),
    ("a.jsonl", GOOD, "--tokenizer=gpt5"),
    ("a.jsonl", GOOD, "--out=a.jsonl/out"),
    ("a.jsonl", GOOD, "--val-fraction=nan"),
    ("a.jsonl", GOOD, "--out=."),
    (".out.part", b"a file of the user", "cannot be written"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad[0]} {bad[2]}")
def test_what_cannot_be_prepared_is_one_line_and_no_folder(tmp_path, monkeypatch, capsys, bad):
    name, content, problem = bad
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_bytes(GOOD)
    Path(name).write_bytes(content)
    arguments = ["--input", name if name[0] == "a" else "a.jsonl", "--tokenizer=shipped"]
    argument = problem if problem.startswith("--") else "--out=out"
    words = re.escape(problem.split("=")[-1])
    refused(capsys, main, *arguments, "--out=out", argument, words=rf"\Aerror: .*{words}")
    assert not Path("out").exists() and Path(name).read_bytes() == content


def test_an_input_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch, capsys):
    (folder := tmp_path / "in" / "locked").mkdir(parents=True)
    write_jsonl(tmp_path / "in" / "a.jsonl", ["some text"] * 40)
    arguments = [f"--input={tmp_path / 'in'}", "--tokenizer=shipped", f"--out={tmp_path / 'out'}"]
    scandir = os.scandir

    def refuse(path):
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:  # root may read all folders
        patch.setattr("os.scandir", refuse)
        refused(capsys, main, *arguments, words="locked: cannot be read: Permission denied")
    if os.name == "posix":  # elsewhere, not everyone may make a link
        (folder / "gone.jsonl").symlink_to("nowhere")
        refused(capsys, main, *arguments, words="gone.jsonl: cannot be read: No such file")


def test_a_folder_that_exists_is_left_alone(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["some text"] * 40)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="exists; remove it"):
        prepare([source], "shipped", tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "thesis.tex"]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl", ["some text"] * 40)
    (tmp_path / "ranks").write_bytes(SHIPPED_RANKS.read_bytes())
    assert main(["--input=~/a.jsonl", "--tokenizer=~/ranks", "--out=~/out"]) == 0
    assert (tmp_path / "out" / "meta.json").exists()


def test_parquet_and_zst_give_the_bytes_of_jsonl(tmp_path, monkeypatch, capsys):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (folder := tmp_path / "in" / "deeper").mkdir(parents=True)
    texts = [None if i % 9 == 0 else f"Text {i}. é " * 20 for i in range(2000)]
    lines = [json.dumps({"id": 1, "body": text}).encode() + b"\n" for text in texts[1000:]]
    halves = b"".join(lines[:500]), b"".join(lines[500:])  # zstd's tools write several frames
    packed = b"".join(pa.compress(half, "zstd", asbytes=True) for half in halves)
    table = pa.table({"id": range(1000), "body": texts[:1000]})
    parquet.write_table(table, folder / "a.parquet", row_group_size=300)
    (folder / "b.jsonl.zst").write_bytes(packed)
    (folder / "README.md").write_text("not a text to learn from")
    plain = write_jsonl(tmp_path / "plain.jsonl", [text for text in texts if text])
    expected = prepare([plain], "shipped", tmp_path / "plain")
    for i, name in enumerate([tmp_path / "in", folder / "*.[pj]*"]):
        assert prepare([name], "shipped", tmp_path / f"out{i}", key="body") == expected
        assert "skipped 223 documents without text" in capsys.readouterr().err

    with pytest.raises(DataError, match=r"\A.*no column text; --key can be: id, body\Z"):
        prepare([folder / "a.parquet"], "shipped", tmp_path / "x")
    (folder / "b.jsonl.zst").write_bytes(packed[:-9])
    (folder / "a.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-9])
    for path in folder.glob("[ab].*"):
        with pytest.raises(DataError, match=r"\A.*cannot be read to its end.*\Z"):
            prepare([path], "shipped", tmp_path / path.name, key="body")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"\A.*needs the package pyarrow: pip install.*\Z"):
        prepare([folder / "b.jsonl.zst"], "shipped", tmp_path / "x")


# argv: at which step it is stopped and how, the arguments of data.prepare
STOPPED = """
import os, shutil, signal, sys, data.prepare as p
def counted(function):
    def call(*arguments, **more):
        global left
        left -= 1
        if left == 0:
            signal.raise_signal(signal.SIGINT) if how == "Ctrl-C" else os._exit(9)
        return function(*arguments, **more)
    return call
left, how = int(sys.argv[1]), sys.argv[2]
p.TASK_BYTES, p.REPORT_TOKENS, os.cpu_count = 1, 1, lambda: 1
p.prepare.__defaults__ = (p.VAL_FRACTION, 100, "text")  # shard_tokens
p.encode_to_numpy, p.np.memmap = counted(p.encode_to_numpy), counted(p.np.memmap)
os.rename, shutil.rmtree = counted(os.rename), counted(shutil.rmtree)
read = p.read_items
p.read_items = lambda path, *more: print(path.name, flush=True) or read(path, *more)
code = p.main(sys.argv[3:])
print("steps", -left)
sys.exit(code)
"""


def test_killed_anywhere_the_same_command_ends_in_the_same_bytes(tmp_path):
    for i in range(4):
        write_jsonl(tmp_path / f"{i}.jsonl", [f"some text, {i}, {j}" for j in range(12)])

    def stopped(out: str, step: int, how: str = "kill") -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", STOPPED, str(step), how, f"--input={tmp_path}"]
        command += ["--tokenizer=shipped", f"--out={tmp_path / out}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    whole = stopped("whole", 0)
    assert whole.returncode == 0
    done = stopped("Ctrl-C", 3, "Ctrl-C")
    assert (done.returncode, done.stderr) == (130, "stopped; the same command goes on\n")
    step, read = 1, []
    while not (tmp_path / "out").exists():
        done = stopped("out", step)
        assert done.returncode == 0 if (tmp_path / "out").exists() else done.returncode == 9
        read += done.stdout.split()[:1]
        step += 6
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / ".out.part").exists() and len(contents(tmp_path / "out")) > 5
    assert read[0] == "0.jsonl" < read[-1] and len(read) > 5  # what is done is not read again
    steps = int(whole.stdout.split()[-1])  # the last one removes the pieces
    assert stopped("late", steps).returncode == 9 and (tmp_path / ".late.part").exists()
    shutil.rmtree(tmp_path / "late")
    assert stopped("late", 0).stdout.startswith("train:")  # nothing is read again
    assert contents(tmp_path / "late") == contents(tmp_path / "whole")


def start(cores: int, source: Path, out: Path) -> subprocess.Popen:
    """data.prepare, with a task for each file."""
    script = f"import os, sys, data.prepare as p; p.TASK_BYTES, os.cpu_count = 1, lambda: {cores}"
    command = [sys.executable, "-c", f"{script}; sys.exit(p.main())", f"--input={source}"]
    command += ["--tokenizer=shipped", f"--out={out}"]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


def test_any_number_of_processes_gives_the_same_bytes(tmp_path):
    for i in range(3):
        write_jsonl(tmp_path / f"{i}.jsonl", [f"some text, {i}, {j}" for j in range(40)])
    for cores in (1, 2):
        assert start(cores, tmp_path, tmp_path / str(cores)).communicate() == (None, b"")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are POSIX's")
@pytest.mark.parametrize("number", ["SIGKILL", "SIGINT"])
def test_a_worker_ends_with_the_main_process(tmp_path, number):
    """In the middle of a file."""
    write_jsonl(tmp_path / "a.jsonl", ["some text"] * 40)
    os.mkfifo(tmp_path / "b.jsonl")
    main = start(2, tmp_path, tmp_path / "out")
    line = json.dumps({"text": "some text " * 1000}).encode() + b"\n"
    with pytest.raises(BrokenPipeError), (tmp_path / "b.jsonl").open("wb", 0) as pipe:
        pipe.write(line)  # a worker reads
        main.send_signal(getattr(signal, number))
        while True:
            pipe.write(line)
    assert (b"goes on" in main.communicate()[1]) == (number == "SIGINT")


def test_an_error_in_a_task_loses_no_text(tmp_path, monkeypatch, small_tasks):
    """Whichever document it comes to; what is behind it must not count as done."""
    for i in range(3):
        write_jsonl(tmp_path / f"{i}.jsonl", [f"some text, {i}, {j}" for j in range(40)])
    prepare([tmp_path], "shipped", tmp_path / "whole")
    encode, errors = data.prepare.encode_to_numpy, {b"some text, 0, 3", b"some text, 2, 39"}

    def failing(encoding, text):
        if text in errors:
            errors.remove(text)
            raise OSError(28, "No space left on device")
        return encode(encoding, text)

    monkeypatch.setattr(data.prepare, "encode_to_numpy", failing)
    with pytest.raises(DataError, match=r"\A.*cannot be written: No space left.*\Z"):
        prepare([tmp_path], "shipped", tmp_path / "out")
    while not (tmp_path / "out").exists():
        with contextlib.suppress(DataError):
            prepare([tmp_path], "shipped", tmp_path / "out")
    assert not errors and contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_script_without_a_guard_is_told_so(tmp_path):
    """Each of its workers would run it again, and wait for itself."""
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, [f"some text, {j}" for j in range(100)])
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); os.cpu_count = lambda: 2\n"
        "import data.prepare as p; from pathlib import Path; p.TASK_BYTES = 1\n"
        f"here = Path({str(tmp_path)!r})\np.prepare([here], 'shipped', here / 'out')\n"
    )
    error = subprocess.run([sys.executable, script], capture_output=True, text=True).stderr
    assert 'needs: if __name__ == "__main__":' in error


def test_an_input_may_be_mended_but_one_that_was_read_may_not_change(tmp_path, small_tasks):
    write_jsonl(first := tmp_path / "a.jsonl", ["some text"] * 40)
    (second := tmp_path / "b.jsonl").write_text("damaged")
    arguments = ([first, second], "shipped", out := tmp_path / "out")
    with pytest.raises(DataError, match=r"b.jsonl, line 1"):
        prepare(*arguments)
    changed = r"\A.*\.out\.part: was begun with other.*remove it to start anew\Z"
    with pytest.raises(DataError, match=changed):
        prepare(*arguments, val_fraction=0.1)
    with pytest.raises(DataError, match=changed):
        prepare([second], *arguments[1:])
    times = first.stat().st_atime_ns, first.stat().st_mtime_ns
    os.utime(first, ns=(0, 0))
    with pytest.raises(DataError, match=changed):
        prepare(*arguments)
    os.utime(first, ns=times)
    write_jsonl(second, ["another"] * 40)
    for name, content in (("counts", b""), ("counts", bytes(99)), ("train", b"cut short")):
        [piece] = tmp_path.glob(".out.part/0*")
        (piece / name).write_bytes(content)
        with pytest.raises(DataError, match=r"\A.*is damaged; remove it, and the same.*\Z"):
            prepare(*arguments)
    shutil.rmtree(piece)
    prepare(*arguments)
    prepare(*arguments[:2], tmp_path / "at once")
    assert contents(out) == contents(tmp_path / "at once")


@pytest.mark.parametrize("made", [False, True])
def test_a_second_process_waits_for_the_first(tmp_path, made):
    source, out = write_jsonl(tmp_path / "a.jsonl", ["some text"] * 40), tmp_path / "out"
    (tmp_path / ".out.part").mkdir()
    command = [sys.executable, "-m", "data.prepare", f"--input={source}", f"--out={out}"]
    with FileLock(tmp_path / ".out.part" / "lock"):
        second = subprocess.Popen(
            [*command, "--tokenizer=shipped"], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        assert "waiting, as another process makes it" in second.stderr.readline()
        if made:
            out.mkdir()
    assert ("exists; remove it" in second.communicate()[1]) == made
    assert second.returncode == (2 if made else 0)
    assert not (tmp_path / ".out.part").exists()


def test_a_disk_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def acquire(*_, **__):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    prepare([write_jsonl(tmp_path / "a.jsonl", ["some text"] * 40)], "shipped", tmp_path / "out")


def test_the_shipped_tokens_stay_as_they_are_whoever_makes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lock = data.prepare._lock  # another process is faster

    def faster(part, out):
        monkeypatch.setattr(data.prepare, "_lock", lock)
        data.prepare.prepare_shipped("data/sotu")
        return lock(part, out)

    monkeypatch.setattr(data.prepare, "_lock", faster)
    data.prepare.prepare_shipped("data/sotu")
    assert os.listdir("data") == ["sotu"]
    dataset = TokenDataset("data/sotu", "train", 128)
    content = torch.cat(dataset.batch(step=1234, batch_size=16, seed=1)).numpy().tobytes()
    assert hashlib.sha256(content).hexdigest().startswith("a9f3cecfb3043b87")
    assert dataset.digest.startswith("6fa350581e94b11d")  # of all files and their tokenizer


@pytest.fixture
def counting(tmp_path) -> TokenDataset:
    """Two shards of use and two too small for a window. A token says where it stands."""
    shards = [range(1000), range(1100, 1105), range(1200, 1700), range(1800, 1800 + T)]
    return TokenDataset(token_folder(tmp_path / "counting", 2000, train=shards), "train", T)


def test_a_batch_follows_from_seed_and_step_and_is_shared_by_ranks(counting):
    again = TokenDataset(counting.data_dir, "train", T)
    expected = {step: counting.batch(step, 8, seed=3) for step in range(1, 41)}
    for step in random.Random(0).sample(range(1, 41), 40):
        x, y = again.batch(step, 8, seed=3)
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (8, T)
        assert torch.equal(x, expected[step][0]) and torch.equal(y, expected[step][1])
        assert torch.equal(y, x + 1)  # so no window crosses from one shard to the next
        for n in (2, 4, 8):
            parts = [again.batch(step, 8, 3, rank, n) for rank in range(n)]
            assert all(map(torch.equal, map(torch.cat, zip(*parts)), (x, y)))
    assert not torch.equal(counting.batch(1, 8, seed=4)[0], expected[1][0])
    assert not torch.equal(counting.batch(1, 8, seed=-3)[0], expected[1][0])


def test_each_epoch_has_each_window_once_in_a_new_order_at_a_new_offset(counting):
    n = counting.windows_per_epoch
    assert n == (1000 - T) // T + (500 - T) // T and n % 8  # some batches are of two epochs
    rows = torch.cat([counting.batch(step, 8, seed=0)[0][:, 0] for step in range(1, 200)])
    orders = rows[: 10 * n].view(10, n).tolist()  # the first token of each window
    for order in orders:
        starts = sorted(order)
        gaps = np.diff(starts)
        assert (gaps >= T).all()  # no token is an input twice ...
        assert (gaps > T).sum() <= 1  # ... and none is left out but around the shards' ends
        assert starts[0] < 2 * T and 1700 - starts[-1] <= 3 * T
        assert abs(np.corrcoef(order, range(n))[0, 1]) < 0.35  # shuffled, not merely rotated
        assert (np.diff(order) == T).mean() < 0.1
    assert len({tuple(np.argsort(order).tolist()) for order in orders}) == 10
    assert len({min(order) for order in orders}) > 5  # offsets


@pytest.mark.parametrize("size", [T + 1, 2 * T, 2 * T + 1, 50])
def test_every_start_position_is_reached(tmp_path, size):
    dataset = TokenDataset(token_folder(tmp_path / "d", train=[range(size)]), "train", T)
    x = torch.cat([dataset.batch(step, 50, seed=0)[0] for step in range(1, 41)])
    assert set(x[:, 0].tolist()) == set(range(size - T))


def test_in_order_predicts_every_token_but_a_shards_first_once(tmp_path):
    sizes = [5 * T + 1, 70, 1, 2, T + 1, T, 3 * T]
    ends = np.cumsum(sizes).tolist()
    shards = [range(end - size, end) for size, end in zip(sizes, ends)]
    dataset = TokenDataset(token_folder(tmp_path / "d", val=shards), "val", T)
    for rows in (1, 3, 100):
        targets = []
        for x, y in dataset.in_order(rows):
            assert torch.equal(y, x + 1) and len(x) <= rows
            assert x.shape[1] == T or (len(x) == 1 and x.shape[1] < T)
            targets += y.flatten().tolist()
        assert targets == [token for shard in shards for token in list(shard)[1:]]
    for cap, n in ((1, T), (T, T), (4 * T + 3, 4 * T), (10**9, len(targets))):  # whole windows
        assert sum(y.numel() for _, y in dataset.in_order(4, max_tokens=cap)) == n


def test_bigram_loss_is_that_of_counted_pairs(tmp_path):
    folder = token_folder(tmp_path / "d", 3, train=[[0, 1, 0, 1], [2]], val=[[0, 1, 1, 0, 2, 0]])
    both = [TokenDataset(folder, split, 1) for split in ("train", "val")]
    # 0 and 1 were followed by one kind of token, 2 by none; arrivals, and one: 2, 3 and 1 of 6
    p = [(2 + 2 * 3 / 6) / 4, (0 + 2 * 3 / 6) / 3, (1 + 2 * 2 / 6) / 3, (2 * 1 / 6) / 4, 2 / 6]
    assert bigram_loss(*both, 10**6) == pytest.approx(-np.mean(np.log(p)))
    assert bigram_loss(*both, 3) == pytest.approx(-np.mean(np.log(p[:3])))
    large = TokenDataset(token_folder(tmp_path / "large", 10_001, train=[range(99)]), "train", 8)
    assert bigram_loss(large, large, 10) is None


@pytest.mark.parametrize(
    "file, content, problem",  # content: None if the file is removed
    [
        ("train_000.bin", bytes(100), "should have 400 bytes"),
        ("train_000.bin", bytes(400), "not what meta.json says"),
        (TOKEN_BYTES, None, "not what meta.json says"),
        ("meta.json", None, "python -m data.prepare"),
        ("meta.json", b"{}", "older version or damaged.*python -m data.prepare"),
    ],
)
def test_damaged_or_older_data_is_refused_in_one_line(tmp_path, file, content, problem):
    folder = token_folder(tmp_path / "d", train=[range(200)])
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(DataError, match=rf"\A.*{problem}.*\Z"):
        TokenDataset(folder, "train", T)


def test_what_is_found_while_reading_is_refused_before_the_model_sees_it(tmp_path, counting):
    few = TokenDataset(token_folder(tmp_path / "few", vocab_size=50, train=[range(60)]), "train", T)
    with pytest.raises(DataError, match="past the vocabulary of 50"):
        [few.batch(step, 8, seed=0) for step in range(1, 9)]
    os.truncate(counting.data_dir / "train_000.bin", 0)
    with pytest.raises(DataError, match="train_000.bin.*cut short"):
        [counting.batch(step, 8, seed=3) for step in range(1, 20)]
