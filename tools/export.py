"""A run as a Hugging Face folder: python -m tools.export OUT_DIR --to FOLDER

The folder is a plain LlamaForCausalLM, which transformers loads without our code. A FOLDER named
*.gguf is a file instead, for llama.cpp. Needs: pip install -r requirements-extra.txt
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import tiktoken

from data.tokenizer import END_OF_TEXT, tokenizer_files
from run import UserError
from run.cost import n_parameters
from run.hugging_face import need_transformers, one_line, to_llama
from tools import command, expanded
from tools.load import Trained, load_trained
from tools.to_gguf import spell_merges, write_gguf

SPECIAL = ("bos_token", "eos_token", "pad_token")


def write_tokenizer(encoding: tiktoken.Encoding, folder: Path) -> None:
    """The same vocabulary with the same ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens, merges = spell_merges(encoding)
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(encoding._pat_str), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(folder / "tokenizer.json"))
    # Not by transformers: what 5 writes, 4 does not read
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings["model_input_names"] = ["input_ids", "attention_mask"]  # 4 has another, too
    settings |= dict.fromkeys(SPECIAL, END_OF_TEXT)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def write_folder(trained: Trained, folder: Path) -> None:
    """Tokenizer, weights and settings."""
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
    llama = to_llama(shape, trained.model.state_dict())
    ids = {f"{key}_id": getattr(tokenizer, f"{key}_id") for key in SPECIAL}
    ids = {key: trained.end_of_text if i is None else i for key, i in ids.items()}
    padding = list(range(trained.vocab_size, shape.vocab_size)) or None
    llama.config.bos_token_id, llama.config.eos_token_id = ids["bos_token_id"], ids["eos_token_id"]
    llama.generation_config = transformers.GenerationConfig(**ids, suppress_tokens=padding)
    llama.save_pretrained(folder)


def export(trained: Trained, folder: Path) -> None:
    """Write the folder or the file, as a whole or not at all. Raises UserError, in one line."""
    if folder.exists():
        raise UserError(f"{folder}: exists; give another --to")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as aside:
            new = Path(aside) / folder.name
            (write_gguf if folder.suffix == ".gguf" else write_folder)(trained, new)
            new.rename(folder)
    except Exception as error:  # of the system, transformers or safetensors
        raise UserError(f"{folder}: cannot be written: {one_line(error)}") from error


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", type=expanded, help="a run's folder")
    parser.add_argument("--to", type=expanded, required=True, help="a folder, or a file *.gguf")
    args = parser.parse_args(argv)
    trained = load_trained(args.out_dir)
    export(trained, args.to)
    print(f"{args.to}: a Llama of {n_parameters(trained.model.config):,} parameters")


if __name__ == "__main__":
    sys.exit(main())
