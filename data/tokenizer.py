"""Text to token ids, with tiktoken or with the tokenizer.json of a Hugging Face folder.

The vocabularies of tiktoken encode any bytes, valid UTF-8 or not.
"""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import tiktoken

from data import DataError

END_OF_TEXT = "<|endoftext|>"
SHIPPED_RANKS = Path(__file__).parent / "corpus" / "sotu.tiktoken"

# Text is cut into pieces by this pattern, then byte pairs are merged inside each piece. It is the
# pattern of GPT-4 (cl100k) and Llama 3, so that their rank files work here too.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the space or sign in front of it
    r"|\p{N}{1,3}"  # numbers, three digits at a time
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation with the line ends behind it
    r"|\s*[\r\n]+"  # line ends
    r"|\s+(?!\S)"  # white space, but for the last one before a word
    r"|\s+"
)

# Text goes to tiktoken in blocks. Without a limit, a megabyte of one letter takes some versions
# quadratic time, and a megabyte of spaces overflows the regex engine. Where it can, a block ends
# before a single space that something follows: PATTERN and gpt2's pattern both start a new piece
# there, so the tokens are those of the whole text. Bytes that are not UTF-8 arrive as the lone
# surrogates U+DC80 to U+DCFF (PEP 383) and get blocks of their own.
_BLOCK = re.compile(
    r"(?P<stray>[\udc80-\udcff]{1,1024})"
    r"|[^\udc80-\udcff]{1,1024}(?= \S|[\udc80-\udcff]|\Z)"
    r"|[^\udc80-\udcff]{1,1024}"
)

# Hugging Face's files spell bytes as printable characters, as GPT-2's bytes_to_unicode does.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
CHARACTER = {byte: chr(byte) for byte in _PRINTABLE}
CHARACTER |= {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
BYTE = {character: byte for byte, character in CHARACTER.items()}


class FolderTokenizer:
    """The tokenizer.json of a Hugging Face folder, with the methods of tiktoken's Encoding that are
    used here.

    Ids are those of transformers' AutoTokenizer with add_special_tokens=False and
    split_special_tokens=True: nothing in a text is special, as everywhere here. Bytes that are not
    UTF-8 become U+FFFD. Needs the package tokenizers.

    Attributes: `name`, `n_vocab`, `eot_token` (the id of `<|endoftext|>`, or else of the
    `eos_token` in tokenizer_config.json), `specials` (the ids of bos, eos and pad, where
    tokenizer_config.json names them). Raises DataError.
    """

    def __init__(self, folder: Path):
        path, where = folder / "tokenizer.json", f"tokenizer {folder}"
        if not path.is_file():
            raise DataError(f"{where}: the folder has no tokenizer.json")
        try:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(path))
        except ImportError:
            way = "pip install -r requirements-extra.txt"
            raise DataError(f"{where}: needs the package tokenizers: {way}") from None
        except Exception as error:  # the package has no class of its own
            raise DataError(f"{where}: cannot read its tokenizer.json: {error}") from None
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocab = tokenizer.get_vocab()
        named = {key: _special_token(folder, key) for key in ("bos", "eos", "pad")}
        end = END_OF_TEXT if END_OF_TEXT in vocab else named["eos"]
        if end not in vocab:
            what = f"neither {END_OF_TEXT} nor an eos_token in tokenizer_config.json"
            raise DataError(f"{where}: nothing ends a text: {what}")
        self._tokenizer, self.name = tokenizer, folder.name
        self.n_vocab, self.eot_token = max(vocab.values()) + 1, vocab[end]
        self.specials = {key: vocab[token] for key, token in named.items() if token in vocab}
        self._byte_level = '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str())["decoder"])

    def encode_ordinary(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode_single_token_bytes(self, token: int) -> bytes:
        """What a token stands for, which may be a part of a character."""
        spelled = self._tokenizer.id_to_token(token) or ""
        if not self._byte_level:  # SentencePiece: \u2581 is a space, <0xE9> a byte
            byte = re.fullmatch("<0x([0-9A-F]{2})>", spelled)
            return bytes.fromhex(byte[1]) if byte else spelled.replace("\u2581", " ").encode()
        if all(character in BYTE for character in spelled):
            return bytes(BYTE[character] for character in spelled)
        return spelled.encode()  # a special token, spelled as it is


Encoding = tiktoken.Encoding | FolderTokenizer


def load_tokenizer(name: str) -> Encoding:
    """`shipped` (1,024 entries), `gpt2` (50,257; tiktoken downloads it once), the path of a rank
    file, or that of a Hugging Face folder.

    A rank file has tiktoken's own format, one `<base64 of the token> <rank>` a line. Text is cut by
    PATTERN, and `<|endoftext|>` gets the id after the last rank.

    Raises DataError if the name is unknown, the file damaged, or gpt2 cannot be downloaded.
    """
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # of the network, a proxy, the disk
            what = f"tiktoken cannot download it ({type(error).__name__})"
            way = "copy its TIKTOKEN_CACHE_DIR from a connected machine, or take another tokenizer"
            raise DataError(f"tokenizer gpt2: {what}; {way}") from None
    path = SHIPPED_RANKS if name == "shipped" else Path(name)
    if path.is_dir():
        return FolderTokenizer(path)
    ranks = _read_ranks(path)
    return tiktoken.Encoding(
        path.name,
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
    )


def tokenizer_files(name: str) -> dict[str, Path]:
    """The files of a tokenizer that prepared data keeps a copy of: name of the copy -> file."""
    if name == "gpt2":
        return {}
    path = SHIPPED_RANKS if name == "shipped" else Path(name)
    if path.is_dir():
        files = (path / "tokenizer.json", path / "tokenizer_config.json")
        return {file.name: file for file in files if file.is_file()}
    return {"tokenizer.tiktoken": path}


def encode_blocks(encoding: Encoding, data: bytes) -> Iterator[list[int]]:
    """The tokens of `data`, block by block. Nothing in it is special: `<|endoftext|>` is text."""
    if isinstance(encoding, FolderTokenizer):  # in one block: how it cuts text is not known here
        yield encoding.encode_ordinary(data.decode("utf-8", "replace"))
        return
    for block in _BLOCK.finditer(data.decode("utf-8", "surrogateescape")):
        if block["stray"]:
            stray = block["stray"].encode("utf-8", "surrogateescape")
            yield [encoding.encode_single_token(bytes([byte])) for byte in stray]
        else:
            yield encoding.encode_ordinary(block.group())


def encode_bytes(encoding: Encoding, data: bytes) -> list[int]:
    """The tokens of any bytes. tiktoken's `decode_bytes` gives exactly `data` back."""
    return [token for block in encode_blocks(encoding, data) for token in block]


def _special_token(folder: Path, key: str) -> str | None:
    """The token that tokenizer_config.json names, as a string or as an object with `content`."""
    try:
        token = json.loads((folder / "tokenizer_config.json").read_bytes())[f"{key}_token"]
        return token["content"] if isinstance(token, dict) else token
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank. Stricter than tiktoken's own loader: with a gap or a missing byte, some text
    far into the data would be a crash or get other tokens."""
    where = f"tokenizer {path}"
    if not path.is_file():
        raise DataError(f"{where}: neither shipped, gpt2, a rank file nor a folder")
    try:
        lines = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: not a file of lines '<base64> <rank>': {error}") from None
    if [int(rank) for _, rank in lines] != list(range(len(ranks))):
        raise DataError(f"{where}: damaged: line n should have rank n - 1 and a token of its own")
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing:
        way = "take a byte-level vocabulary, which encodes any text"
        raise DataError(f"{where}: {missing} of the 256 single bytes are missing; {way}")
    return ranks
