"""A run as a Hugging Face folder: python -m tools.export OUT_DIR --to FOLDER

The folder is a plain LlamaForCausalLM, which transformers loads without our code."""

import json
import tempfile
from argparse import ArgumentParser
from pathlib import Path
from textwrap import shorten

import tiktoken

from data.command import UserError, command
from data.tokenizer import CHARACTER, END_OF_TEXT, tokenizer_files
from run.cost import n_parameters
from run.hugging_face import llama_config, need_transformers, weight_names
from tools import Trained, expanded, load_trained

SPECIAL = ("bos_token", "eos_token", "pad_token")


def write_tokenizer(encoding: tiktoken.Encoding, folder: Path) -> None:
    """The same vocabulary with the same ids. tiktoken merges the pair that makes the token of the
    lowest rank. So each pair that makes a token is a merge here, in the order of the ranks."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    spelled = {token: "".join(CHARACTER[byte] for byte in token) for token in tokens}
    merges = []
    for token in tokens:
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += [(spelled[a], spelled[b]) for a, b in halves if a in spelled and b in spelled]
    vocab = {token: i for i, token in enumerate(spelled.values())}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    cut = pre_tokenizers.Split(Regex(encoding._pat_str), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, spell])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(folder / "tokenizer.json"))
    # Not by transformers: what 5 writes, 4 does not read
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings["model_input_names"] = ["input_ids", "attention_mask"]  # 4 has another, too
    settings |= dict.fromkeys(SPECIAL, END_OF_TEXT)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def write_folder(trained: Trained, folder: Path) -> None:
    transformers = need_transformers()
    folder.mkdir()
    own = tokenizer_files(trained.tokenizer_name)
    if "tokenizer.json" in own:
        for name, file in own.items():
            (folder / name).write_bytes(file.read_bytes())
    else:
        write_tokenizer(trained.tokenizer, folder)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    shape = trained.model.config
    llama, weights = transformers.LlamaForCausalLM(llama_config(shape)), trained.model.state_dict()
    llama.load_state_dict({theirs: weights[ours] for ours, theirs in weight_names(shape).items()})
    ids = {f"{key}_id": getattr(tokenizer, f"{key}_id") for key in SPECIAL}
    ids = {key: trained.tokenizer.eot_token if i is None else i for key, i in ids.items()}
    padding = list(range(trained.tokenizer.n_vocab, shape.vocab_size)) or None
    llama.config.bos_token_id, llama.config.eos_token_id = ids["bos_token_id"], ids["eos_token_id"]
    if (end := trained.tokenizer.eot_token) != ids["eos_token_id"]:  # an end of chat, say
        ids["eos_token_id"] = [ids["eos_token_id"], end]
    llama.generation_config = transformers.GenerationConfig(**ids, suppress_tokens=padding)
    llama.save_pretrained(folder)


def export(trained: Trained, folder: Path) -> None:
    """Write the folder, as a whole or not at all. Raises UserError, in one line."""
    if folder.exists():
        raise UserError(f"{folder}: exists; give another --to")
    if (d_model := (shape := trained.model.config).d_model) % shape.n_head:
        what = f"{shape.n_head} query heads do not divide d_model={d_model}, as transformers asks"
        raise UserError(f"{what}; after its prune window, a run may have other widths")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as aside:
            new = Path(aside) / folder.name
            write_folder(trained, new)
            new.rename(folder)
    except Exception as error:  # of the system, transformers or safetensors
        raise UserError(f"{folder}: cannot be written: {shorten(str(error), 300)}") from error


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=expanded, help="a run's folder")
    parser.add_argument("--to", type=expanded, required=True, help="the folder to make")
    args = parser.parse_args(argv)
    trained = load_trained(args.out_dir)
    export(trained, args.to)
    print(f"{args.to}: a Llama of {n_parameters(trained.model.config):,} parameters")


if __name__ == "__main__":
    raise SystemExit(main())
