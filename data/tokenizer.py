"""Text to token ids, with tiktoken or the tokenizer.json of a Hugging Face folder."""

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import tiktoken

from data.command import UserError

END_OF_TEXT = "<|endoftext|>"
SHIPPED_RANKS = Path(__file__).parent / "corpus" / "sotu.tiktoken"

# tiktoken cuts text into pieces with this pattern, then merges byte pairs inside each
# piece. GPT-4 (cl100k) and Llama 3 use the same pattern, so their rank files work here.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the space or sign in front of it
    r"|\p{N}{1,3}"  # numbers, three digits at a time
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation with the line ends behind it
    r"|\s*[\r\n]+"  # line ends
    r"|\s+(?!\S)"  # white space, except the last one before a word
    r"|\s+"
)

# We give tiktoken blocks of limited size, because a megabyte of spaces overflows its
# regex engine. If possible, a block ends before a single space with other text behind
# it. Both PATTERN and the pattern of gpt2 start a new match at such a space, so the
# blocks give the same tokens as the whole text. Bytes that are not UTF-8 arrive as the
# lone surrogates U+DC80 to U+DCFF (PEP 383) and get blocks of their own.
_BLOCK = re.compile(
    r"(?P<stray>[\udc80-\udcff]{1,1024})"
    r"|(?:[^\udc80-\udcff]{1,1024}(?= \S)){1,64}"
    r"|[^\udc80-\udcff]{1,1024}"
)


def _spell_bytes() -> dict[int, str]:
    """Returns a printable character for each byte: GPT-2's bytes_to_unicode."""
    characters = {}
    substitute = 256
    for byte in range(256):
        character = chr(byte)
        if character == " " or not character.isprintable():
            character = chr(substitute)
            substitute += 1
        characters[byte] = character
    return characters


# Hugging Face's files spell each byte of a token as one printable character.
CHARACTER = _spell_bytes()
BYTE = {character: bytes([byte]) for byte, character in CHARACTER.items()}


class FolderTokenizer:
    """The tokenizer.json of a Hugging Face folder.

    It has those methods of tiktoken's Encoding that this project uses. Its ids are the
    ids of transformers' AutoTokenizer with add_special_tokens=False and
    split_special_tokens=True: nothing in a text is special. Bytes that are not UTF-8
    become U+FFFD. `eot_token` is the id of `<|endoftext|>`. If the vocabulary has no
    such token, it is the id of the eos_token in tokenizer_config.json.

    Raises UserError if the files cannot be read or name no end of a text.
    """

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            vocabulary = tokenizer.get_vocab()
            self.eot_token = vocabulary[_end_of_text(folder, vocabulary)]
            self.n_vocab = max(vocabulary.values()) + 1
        except Exception as error:  # tokenizers raises plain Exceptions
            problem = f"cannot read its tokenizer.json, or find {END_OF_TEXT}"
            problem += f" or an eos_token: {error!r}"
            raise UserError(f"tokenizer {folder}: {problem}") from None
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._is_byte_level = "ByteLevel" in str(tokenizer.decoder)

    def encode_ordinary(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode_single_token_bytes(self, token: int) -> bytes:
        """Returns the bytes of a token, perhaps only a part of a character."""
        spelling = self._tokenizer.id_to_token(token) or ""
        if self._is_byte_level:
            # Only special tokens have characters that are not in BYTE.
            return b"".join(BYTE.get(c, c.encode()) for c in spelling)
        # SentencePiece spells a single byte as <0x0A>, and a space as U+2581.
        byte = re.fullmatch("<0x([0-9A-F]{2})>", spelling)
        if byte:
            return bytes.fromhex(byte[1])
        return spelling.replace("\u2581", " ").encode()


def _end_of_text(folder: Path, vocabulary: dict[str, int]) -> str:
    """Returns how a Hugging Face folder spells the token that ends a text."""
    if END_OF_TEXT in vocabulary:
        return END_OF_TEXT
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    token = config["eos_token"]
    if isinstance(token, dict):  # transformers 4 wrote an object here
        return token["content"]
    return token


Encoding = tiktoken.Encoding | FolderTokenizer


def load_tokenizer(name: str) -> Encoding:
    """Returns the tokenizer that a name or a path stands for.

    - `shipped`: the tokenizer of the shipped corpus, with 1,024 entries
    - `gpt2`: 50,257 entries; tiktoken downloads them once
    - the path of a Hugging Face folder
    - the path of a rank file in tiktoken's format: a line `<base64 of the token>
      <rank>` for each token. PATTERN cuts the text, and `<|endoftext|>` gets the id
      after the last rank.

    Raises UserError if it is none of these.
    """
    if name == "gpt2":
        return _load_gpt2()
    path = SHIPPED_RANKS if name == "shipped" else Path(name)
    if path.is_dir():
        return FolderTokenizer(path)
    try:
        ranks = _read_ranks(path)
    except (OSError, ValueError):
        problem = "neither shipped, gpt2, a Hugging Face folder nor a file of lines"
        problem += " '<base64> <rank>' (all 256 bytes; no gap in ranks)"
        raise UserError(f"tokenizer {path}: {problem}") from None
    return tiktoken.Encoding(
        path.name,
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
    )


def _load_gpt2() -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # the network, a proxy or the disk may fail
        problem = f"tiktoken cannot download it ({type(error).__name__})"
        advice = "copy TIKTOKEN_CACHE_DIR from a connected machine"
        raise UserError(f"tokenizer gpt2: {problem}; {advice}") from None


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Returns token -> rank. Raises OSError or ValueError if it is no rank file.

    tiktoken's own loader caches a file by its path, so it would miss a new content.
    """
    ranks = {}
    for line in path.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("the ranks have a gap")
    if not ranks.keys() >= set(BYTE.values()):
        raise ValueError("a byte has no rank")
    return ranks


def tokenizer_files(name: str) -> dict[str, Path]:
    """Returns a tokenizer's files: the name that prepared data gives a copy -> file."""
    if name == "gpt2":
        return {}
    path = SHIPPED_RANKS if name == "shipped" else Path(name)
    files = {}
    for file_name in ("tokenizer.json", "tokenizer_config.json"):
        if (path / file_name).is_file():
            files[file_name] = path / file_name
    return files or {"tokenizer.tiktoken": path}


def tokenizer_digest(name: str) -> str:
    """Returns the sha256 of a tokenizer's files, or of its name if it has none (gpt2).

    The path does not count: a copy of the files has the same digest. `name` is what
    load_tokenizer takes. Raises OSError if a file cannot be read.
    """
    sha256 = {}
    for copy, path in tokenizer_files(name).items():
        sha256[copy] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digest_of_files(name, sha256)


def digest_of_files(name: str, sha256: dict[str, str]) -> str:
    """Returns the tokenizer_digest that follows from the sha256 of each file's copy."""
    content = repr(sorted(sha256.items())) if sha256 else name
    return hashlib.sha256(content.encode()).hexdigest()


def all_tokens(encoding: Encoding) -> list[bytes]:
    """Returns the bytes of each token. The token that ends a text has none."""
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    tokens[encoding.eot_token] = b""
    return tokens


def encode_to_numpy(encoding: Encoding, data: bytes) -> np.ndarray:
    """Returns the tokens of any bytes, uint32 (n,).

    Nothing in the bytes is special: `<|endoftext|>` is encoded as text.
    """
    if isinstance(encoding, FolderTokenizer):
        # One block, because we do not know where this tokenizer cuts a text.
        text = data.decode("utf-8", "replace")
        return np.array(encoding.encode_ordinary(text), np.uint32)

    parts = [np.empty(0, np.uint32)]
    for block in _BLOCK.finditer(data.decode("utf-8", "surrogateescape")):
        if block["stray"]:
            parts.append(_encode_stray(encoding, block["stray"]))
        else:
            tokens = encoding.encode_to_numpy(block.group(), disallowed_special=())
            parts.append(tokens)
    return np.concatenate(parts)


def _encode_stray(encoding: tiktoken.Encoding, surrogates: str) -> np.ndarray:
    """Returns one token for each byte that is not UTF-8."""
    tokens = []
    for surrogate in surrogates:
        byte = bytes([ord(surrogate) - 0xDC00])
        tokens.append(encoding.encode_single_token(byte))
    return np.array(tokens, np.uint32)
