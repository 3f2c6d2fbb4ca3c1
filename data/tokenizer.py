"""Text to token ids with tiktoken, whose vocabularies keep any bytes, valid UTF-8 or not; or with
the tokenizer.json of a Hugging Face folder."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import tiktoken

from data import DataError

END_OF_TEXT = "<|endoftext|>"
SHIPPED_RANKS = Path(__file__).parent / "corpus" / "sotu.tiktoken"

# How text is cut into pieces before byte pairs are merged inside each: the pattern of GPT-4
# (cl100k) and Llama 3, so that their rank files work here too.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the space or sign in front of it
    r"|\p{N}{1,3}"  # numbers, three digits at a time
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation with the line ends behind it
    r"|\s*[\r\n]+"  # line ends
    r"|\s+(?!\S)"  # white space, but for the last one before a word
    r"|\s+"
)

# What tiktoken sees at a time. Without a bound, a megabyte of one letter takes some versions
# quadratic time, and a megabyte of spaces overflows the regex engine. A block ends, where it can,
# before a single space that something follows: there PATTERN and gpt2's pattern both start a new
# piece, so the tokens are those of the whole text. Bytes that are not UTF-8 arrive as the lone
# surrogates U+DC80 to U+DCFF (PEP 383) and go their own way.
_BLOCK = re.compile(
    r"(?P<stray>[\udc80-\udcff]{1,1024})"
    r"|[^\udc80-\udcff]{1,1024}(?= \S|[\udc80-\udcff]|\Z)"
    r"|[^\udc80-\udcff]{1,1024}"
)


class FolderTokenizer:
    """The tokenizer.json in a Hugging Face folder, with what is used here of tiktoken's Encoding.

    Ids are those of transformers' AutoTokenizer with add_special_tokens=False and
    split_special_tokens=True: as everywhere here, nothing in a text is special. Bytes that are not
    UTF-8 become U+FFFD, which such a tokenizer need not keep apart. Needs the package tokenizers.

    Attributes: `name`, `n_vocab`, `eot_token`: the id of `<|endoftext|>`, or else of the
    `eos_token` that tokenizer_config.json names; `specials`: the ids of those of bos, eos and pad
    that it names. Raises DataError.
    """

    def __init__(self, folder: Path):
        path, where = folder / "tokenizer.json", f"tokenizer {folder}"
        if not path.is_file():
            raise DataError(f"{where}: the folder has no tokenizer.json")
        try:
            from tokenizers import Tokenizer
        except ImportError:
            way = "pip install -r requirements-hf.txt"
            raise DataError(f"{where}: needs the package tokenizers: {way}") from None
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package has no class of its own
            raise DataError(f"{where}: cannot read its tokenizer.json: {error}") from None
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocab = tokenizer.get_vocab()
        end = END_OF_TEXT if END_OF_TEXT in vocab else _special_token(folder, "eos")
        if end not in vocab:
            what = f"neither {END_OF_TEXT} nor an eos_token in tokenizer_config.json"
            raise DataError(f"{where}: nothing ends a text: {what}")
        self._tokenizer, self.name = tokenizer, folder.name
        self.n_vocab, self.eot_token = max(vocab.values()) + 1, vocab[end]
        named = {key: _special_token(folder, key) for key in ("bos", "eos", "pad")}
        self.specials = {key: vocab[token] for key, token in named.items() if token in vocab}
        self._byte_level = '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str())["decoder"])

    def encode_ordinary(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def decode_single_token_bytes(self, token: int) -> bytes:
        """What a token stands for, which may be a part of a character."""
        from data.tokenizer_json import CHARACTER

        spelled = self._tokenizer.id_to_token(token) or ""
        if not self._byte_level:  # SentencePiece writes a space, or a byte that is no character, so
            byte = re.fullmatch("<0x([0-9A-F]{2})>", spelled)
            return bytes.fromhex(byte[1]) if byte else spelled.replace("\u2581", " ").encode()
        byte_of = {character: byte for byte, character in CHARACTER.items()}
        if all(character in byte_of for character in spelled):
            return bytes(byte_of[character] for character in spelled)
        return spelled.encode()  # a special token, spelled as it is


Encoding = tiktoken.Encoding | FolderTokenizer


def load_tokenizer(name: str) -> Encoding:
    """`shipped` (1,024 entries), `gpt2` (50,257; tiktoken downloads it once), a rank file, or a
    Hugging Face folder.

    A rank file is tiktoken's own format, one `<base64 of the token> <rank>` a line. It is split by
    PATTERN, and `<|endoftext|>` gets the id after its last rank.

    Raises DataError: unknown name, malformed rank file, gpt2 not to be had; what FolderTokenizer
    raises.
    """
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the network, a proxy or a full disk comes up with
            raise DataError(
                f"tokenizer gpt2: tiktoken cannot download it ({type(error).__name__}); load it "
                "once on a connected machine with TIKTOKEN_CACHE_DIR=FOLDER, copy FOLDER here and "
                "set the same variable, or give --tokenizer shipped or a rank file"
            ) from None
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
    """What a folder of prepared data keeps of a tokenizer: file name there -> file here."""
    if name == "gpt2":
        return {}
    path = SHIPPED_RANKS if name == "shipped" else Path(name)
    if path.is_dir():
        files = (path / "tokenizer.json", path / "tokenizer_config.json")
        return {file.name: file for file in files if file.is_file()}
    return {"tokenizer.tiktoken": path}


def encode_blocks(encoding: Encoding, data: bytes) -> Iterator[list[int]]:
    """The tokens of `data`, a bounded block at a time; all at once for a FolderTokenizer, of whose
    pieces nothing is known.

    Nothing in `data` is special: the string `<|endoftext|>` in a text is text.
    """
    if isinstance(encoding, FolderTokenizer):
        yield encoding.encode_ordinary(data.decode("utf-8", "replace"))
        return
    for block in _BLOCK.finditer(data.decode("utf-8", "surrogateescape")):
        if block["stray"]:
            stray = block["stray"].encode("utf-8", "surrogateescape")
            yield [encoding.encode_single_token(bytes([byte])) for byte in stray]
        else:
            yield encoding.encode_ordinary(block.group())


def encode_bytes(encoding: Encoding, data: bytes) -> list[int]:
    """The tokens of any bytes: tiktoken's `decode_bytes` gives exactly `data` back."""
    return [token for block in encode_blocks(encoding, data) for token in block]


def _special_token(folder: Path, key: str) -> str | None:
    """What tokenizer_config.json names, as a string or as an object with `content`."""
    try:
        token = json.loads((folder / "tokenizer_config.json").read_bytes())[f"{key}_token"]
        return token["content"] if isinstance(token, dict) else token
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Stricter than tiktoken's own loader: a gap or a missing byte would surface as a crash, or as
    other tokens, at some text far into the data."""
    if not path.is_file():
        raise DataError(f"tokenizer {str(path)!r}: neither shipped, gpt2, a rank file nor a folder")
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"tokenizer {path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            encoded, rank = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank)
        except ValueError:
            raise DataError(
                f"tokenizer {path}, line {number}: not '<base64> <rank>'; is this a tiktoken file?"
            ) from None
        if rank != len(ranks) or token in ranks:
            problem = "this token again" if token in ranks else f"rank {len(ranks)} should be here"
            raise DataError(f"tokenizer {path}, line {number}: {problem}; the file is damaged")
        ranks[token] = rank
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing:
        raise DataError(
            f"tokenizer {path}: {missing} of the 256 single bytes are missing, so that not every "
            "text can be encoded; take a byte-level vocabulary"
        )
    return ranks
