"""tokenizer.json, the format of Hugging Face's tokenizers: a byte-level BPE written as a dict."""

import tiktoken

from data.tokenizer import CHARACTER, END_OF_TEXT

SPLIT_BY_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def byte_level_bpe(
    vocab: dict[str, int],
    merges: list[str],
    specials: dict[str, int],
    splits: list[dict],
    whole_first: bool,
) -> dict:
    """The content of a tokenizer.json.

    vocab: token -> id. merges: "left right", in order of priority. specials: token -> id. splits:
    pre-tokenizers, of which the last spells bytes as characters. whole_first: a piece of text that
    is a token becomes that token, whatever its merges would give.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": True} for token, i in specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "post_processor": None,
        "decoder": SPLIT_BY_BYTE_LEVEL | {"use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": whole_first,
            "vocab": vocab,
            "merges": merges,
        },
    }


def from_tiktoken(encoding: tiktoken.Encoding) -> dict:
    """The same vocabulary with the same ids. tiktoken merges the pair that makes the token of the
    lowest rank. So each pair that makes a token is a merge here, in the order of the ranks.
    """
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    spelled = {token: "".join(CHARACTER[byte] for byte in token) for token in tokens}
    merges = []
    for token in tokens:
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += [f"{spelled[a]} {spelled[b]}" for a, b in halves if a in spelled and b in spelled]
    pattern = {"type": "Split", "pattern": {"Regex": encoding._pat_str}}
    splits = [
        pattern | {"behavior": "Isolated", "invert": False},
        SPLIT_BY_BYTE_LEVEL | {"use_regex": False},
    ]
    vocab = {spelled[token]: i for i, token in enumerate(tokens)}
    special = {END_OF_TEXT: encoding.eot_token}
    return byte_level_bpe(vocab | special, merges, special, splits, whole_first=True)
