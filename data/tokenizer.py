"""Text to token ids, with tiktoken or with the tokenizer.json of a Hugging Face folder."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import tiktoken

from data.command import UserError

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

# Text goes to tiktoken in blocks of limited size: a megabyte of spaces overflows its regex engine.
# Where it can, a block ends before a single space that something follows: PATTERN and gpt2's both
# start a new match there, so the tokens are those of the whole text. Bytes that are not UTF-8
# arrive as the lone surrogates U+DC80 to U+DCFF (PEP 383) and get blocks of their own.
_BLOCK = re.compile(
    r"(?P<stray>[\udc80-\udcff]{1,1024})"
    r"|(?:[^\udc80-\udcff]{1,1024}(?= \S)){1,64}"
    r"|[^\udc80-\udcff]{1,1024}"
)

# Hugging Face's files spell bytes as printable characters, as GPT-2's bytes_to_unicode does.
CHARACTER = {byte: chr(byte) for byte in range(256) if chr(byte).isprintable() and byte != 0x20}
CHARACTER |= {byte: chr(256 + i) for i, byte in enumerate(sorted({*range(256)} - CHARACTER.keys()))}
BYTE = {character: bytes([byte]) for byte, character in CHARACTER.items()}


class FolderTokenizer:
    """The tokenizer.json of a Hugging Face folder, with what is used here of tiktoken's Encoding.
    Ids are those of transformers' AutoTokenizer with add_special_tokens=False and
    split_special_tokens=True: nothing in a text is special. Bytes that are not UTF-8 become U+FFFD.
    `eot_token`: of `<|endoftext|>`, or the eos_token in tokenizer_config.json. Raises UserError."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        try:
            self._tokenizer = tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            vocab, end = tokenizer.get_vocab(), END_OF_TEXT
            if end not in vocab:
                end = json.loads((folder / "tokenizer_config.json").read_bytes())["eos_token"]
                end = end["content"] if isinstance(end, dict) else end  # of transformers 4
            self.eot_token, self.n_vocab = vocab[end], max(vocab.values()) + 1
        except Exception as error:  # the package has no class of its own
            what = f"cannot read its tokenizer.json, or find {END_OF_TEXT} or an eos_token"
            raise UserError(f"tokenizer {folder}: {what}: {error!r}") from None
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._byte_level = "ByteLevel" in str(tokenizer.decoder)

    def encode_ordinary(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode_single_token_bytes(self, token: int) -> bytes:
        """What a token stands for, which may be a part of a character."""
        spelled = self._tokenizer.id_to_token(token) or ""
        if self._byte_level:  # of other characters: a special token
            return b"".join(BYTE.get(character, character.encode()) for character in spelled)
        byte = re.fullmatch("<0x([0-9A-F]{2})>", spelled)  # SentencePiece; \u2581 is a space there
        return bytes.fromhex(byte[1]) if byte else spelled.replace("\u2581", " ").encode()


Encoding = tiktoken.Encoding | FolderTokenizer


def load_tokenizer(name: str) -> Encoding:
    """`shipped` (1,024 entries), `gpt2` (50,257; tiktoken downloads it once), a Hugging Face
    folder, or a rank file in tiktoken's format: `<base64 of the token> <rank>` a line. With that,
    PATTERN cuts text, and `<|endoftext|>` gets the id after the last rank. Raises UserError."""
    if name == "gpt2":
        try:
            return tiktoken.get_encoding(name)
        except Exception as error:  # of the network, a proxy, the disk
            what = f"tokenizer gpt2: tiktoken cannot download it ({type(error).__name__})"
            raise UserError(f"{what}; copy TIKTOKEN_CACHE_DIR from a connected machine") from None
    path = SHIPPED_RANKS if name == "shipped" else Path(name)
    if path.is_dir():
        return FolderTokenizer(path)
    try:  # not tiktoken's own loader: it caches a file by its path, whatever it holds by now
        lines = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        if set(BYTE.values()) - ranks.keys() or sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError
    except (OSError, ValueError):
        what = "neither shipped, gpt2, a Hugging Face folder nor a file of lines '<base64> <rank>'"
        raise UserError(f"tokenizer {path}: {what} (all 256 bytes; no gap in ranks)") from None
    end = {END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding(path.name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=end)


def tokenizer_files(name: str) -> dict[str, Path]:
    """The files of a tokenizer that prepared data keeps a copy of: name of the copy -> file."""
    if name == "gpt2":
        return {}
    path = SHIPPED_RANKS if name == "shipped" else Path(name)
    in_folder = (path / "tokenizer.json", path / "tokenizer_config.json")
    found = {file.name: file for file in in_folder if file.is_file()}
    return found or {"tokenizer.tiktoken": path}


def all_tokens(encoding: Encoding) -> list[bytes]:
    """The text that each token stands for. The end of a text has none, however it is spelled."""
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    tokens[encoding.eot_token] = b""
    return tokens


def encode_to_numpy(encoding: Encoding, data: bytes) -> np.ndarray:
    """uint32 (n,): the tokens of any bytes. Nothing in them is special: `<|endoftext|>` is text."""
    if isinstance(encoding, FolderTokenizer):  # in one block: how it cuts text is not known here
        return np.array(encoding.encode_ordinary(data.decode("utf-8", "replace")), np.uint32)
    parts = [np.empty(0, np.uint32)]
    for block in _BLOCK.finditer(data.decode("utf-8", "surrogateescape")):
        if stray := block["stray"]:
            tokens = [encoding.encode_single_token(bytes([ord(x) - 0xDC00])) for x in stray]
            parts.append(np.array(tokens, np.uint32))
        else:
            parts.append(encoding.encode_to_numpy(block.group(), disallowed_special=()))
    return np.concatenate(parts)
