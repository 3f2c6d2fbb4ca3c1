"""A run as a Hugging Face folder: python -m tools.export OUT_DIR --to FOLDER

FOLDER is a plain LlamaForCausalLM, which transformers loads without our code.
"""

import json
import tempfile
from argparse import ArgumentParser
from pathlib import Path
from textwrap import shorten

import tiktoken

from data.command import UserError, command
from data.tokenizer import CHARACTER, END_OF_TEXT, tokenizer_files
from tools import Trained, expanded, load_trained
from tools.import_hf import llama_config, need_transformers, weight_names

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")


def write_tokenizer(encoding: tiktoken.Encoding, folder: Path) -> None:
    """Write a tokenizer.json with the same vocabulary and the same ids.

    tiktoken merges the pair of tokens whose result has the lowest rank. So every pair
    that makes a token is a merge here, in the order of ranks.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    spelling = {}
    for i in range(encoding.eot_token):
        token = encoding.decode_single_token_bytes(i)
        spelling[token] = "".join(CHARACTER[byte] for byte in token)
    merges = []
    for token in spelling:
        for i in range(1, len(token)):
            left = spelling.get(token[:i])
            right = spelling.get(token[i:])
            if left and right:
                merges.append((left, right))
    vocabulary = {text: i for i, text in enumerate(spelling.values())}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(encoding._pat_str), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(folder / "tokenizer.json"))
    # By hand, because transformers 4 cannot read what transformers 5 writes.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    for key in SPECIAL_TOKENS:
        settings[key] = END_OF_TEXT
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def write_model(trained: Trained, folder: Path) -> None:
    """Write weights and settings. The folder holds the tokenizer already."""
    transformers = need_transformers()
    shape = trained.model.config
    ours = trained.model.state_dict()
    llama = transformers.LlamaForCausalLM(llama_config(shape))
    names = weight_names(shape)
    llama.load_state_dict({theirs: ours[name] for name, theirs in names.items()})

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    end_of_text = trained.tokenizer.eot_token
    ids = {}
    for key in SPECIAL_TOKENS:
        token_id = getattr(tokenizer, f"{key}_id")
        ids[f"{key}_id"] = end_of_text if token_id is None else token_id
    llama.config.bos_token_id = ids["bos_token_id"]
    llama.config.eos_token_id = ids["eos_token_id"]
    if ids["eos_token_id"] != end_of_text:  # the end of a chat's turn, for example
        ids["eos_token_id"] = [ids["eos_token_id"], end_of_text]
    padding = list(range(trained.tokenizer.n_vocab, shape.vocab_size))
    llama.generation_config = transformers.GenerationConfig(
        **ids, suppress_tokens=padding or None
    )
    llama.save_pretrained(folder)


def write_folder(trained: Trained, folder: Path) -> None:
    """Write a Hugging Face folder."""
    folder.mkdir()
    files = tokenizer_files(trained.tokenizer_name)
    if "tokenizer.json" in files:
        for name, file in files.items():
            (folder / name).write_bytes(file.read_bytes())
    else:
        write_tokenizer(trained.tokenizer, folder)
    write_model(trained, folder)


def export(trained: Trained, folder: Path) -> None:
    """Write the folder, as a whole or not at all. Raises UserError."""
    if folder.exists():
        raise UserError(f"{folder}: exists; give another --to")
    shape = trained.model.config
    if shape.d_model % shape.n_head:
        problem = f"{shape.n_head} query heads do not divide d_model={shape.d_model}"
        advice = "after its prune window, a run may have other widths"
        raise UserError(f"{problem}, but transformers asks for it; {advice}")
    parent = folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=parent) as temporary:
            new = Path(temporary) / folder.name
            write_folder(trained, new)
            new.rename(folder)
    except Exception as error:  # of the system, transformers or safetensors
        reason = shorten(str(error), 300)
        raise UserError(f"{folder}: cannot be written: {reason}") from error


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=expanded, help="a run's folder")
    parser.add_argument("--to", type=expanded, required=True, help="the folder to make")
    args = parser.parse_args(argv)
    trained = load_trained(args.out_dir)
    export(trained, args.to)
    n_params = trained.model.config.n_params()
    print(f"{args.to}: a Llama of {n_params:,} parameters")


if __name__ == "__main__":
    raise SystemExit(main())
