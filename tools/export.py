"""A run as a Hugging Face folder: python -m tools.export OUT_DIR --to FOLDER

The folder is a plain LlamaForCausalLM, which transformers loads without our code. A FOLDER named
*.gguf is a file instead, for llama.cpp. Needs: pip install -r requirements-extra.txt"""

import json
import tempfile
from argparse import ArgumentParser
from contextlib import closing
from pathlib import Path
from textwrap import shorten

import tiktoken

from data import command
from data.tokenizer import CHARACTER, END_OF_TEXT, FolderTokenizer, tokenizer_files
from run import UserError
from run.cost import n_parameters
from run.hugging_face import llama_config, need_transformers, weight_names
from tools import Trained, expanded, load_trained

SPECIAL = ("bos_token", "eos_token", "pad_token")


def spell_merges(encoding: tiktoken.Encoding) -> tuple[list[str], list[tuple[str, str]]]:
    """All tokens but <|endoftext|>, in printable characters, and their merges. tiktoken merges the
    pair that makes the token of the lowest rank. So each pair that makes a token is a merge here,
    in the order of the ranks."""
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    spelled = {token: "".join(CHARACTER[byte] for byte in token) for token in tokens}
    merges = []
    for token in tokens:
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += [(spelled[a], spelled[b]) for a, b in halves if a in spelled and b in spelled]
    return list(spelled.values()), merges


def write_tokenizer(encoding: tiktoken.Encoding, folder: Path) -> None:
    """The same vocabulary with the same ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens, merges = spell_merges(encoding)
    vocab = {token: i for i, token in enumerate(tokens)}
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
    llama.generation_config = transformers.GenerationConfig(**ids, suppress_tokens=padding)
    llama.save_pretrained(folder)


def write_gguf(trained: Trained, path: Path) -> None:
    """The architecture is `llama`, the weights stay in float32. Rows of the embeddings that only
    pad the vocabulary are left out, so that no program can say them. Raises UserError: no package
    gguf, or a tokenizer that is not one of tiktoken's."""
    try:
        import gguf
    except ImportError:
        raise UserError("no package gguf: pip install -r requirements-extra.txt") from None
    if isinstance(trained.tokenizer, FolderTokenizer):
        way = "export a folder, and give it to llama.cpp's convert_hf_to_gguf.py"
        raise UserError(f"the model has a Hugging Face tokenizer; {way}")
    shape, end = trained.model.config, trained.tokenizer.eot_token
    with closing(gguf.GGUFWriter(path, "llama")) as file:
        file.add_file_type(gguf.LlamaFileType.ALL_F32)
        sizes = {"vocab_size": trained.tokenizer.n_vocab, "context_length": shape.context_length}
        sizes |= {"embedding_length": shape.d_model, "block_count": shape.n_layer}
        sizes |= {"feed_forward_length": shape.d_ff, "head_count": shape.n_head}
        sizes |= {"head_count_kv": shape.n_kv_head, "key_length": shape.head_dim}
        sizes |= {"value_length": shape.head_dim, "rope_dimension_count": shape.head_dim}
        sizes |= {"rope_freq_base": shape.rope_theta, "layer_norm_rms_eps": shape.norm_eps}
        for name, size in sizes.items():
            getattr(file, f"add_{name}")(size)

        tokens, merges = spell_merges(trained.tokenizer)
        file.add_tokenizer_model("gpt2")  # byte pairs, whatever the vocabulary
        # How a text is cut before the merges: PATTERN of data/tokenizer.py is Llama 3's, too
        file.add_tokenizer_pre("gpt-2" if trained.tokenizer_name == "gpt2" else "llama-bpe")
        file.add_token_list([*tokens, END_OF_TEXT])
        file.add_token_types([gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL])
        file.add_token_merges([f"{a} {b}" for a, b in merges])
        file.add_bos_token_id(end)
        file.add_eos_token_id(end)
        file.add_add_bos_token(False)  # llama.cpp would put one before a text, and we do not

        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.n_layer)
        theirs = weight_names(shape)
        for ours, weight in trained.model.named_parameters():  # a tied one comes once
            weight = weight.detach().float().cpu()
            if ours in ("embed.weight", "unembed.weight"):
                weight = weight[: trained.tokenizer.n_vocab]
            if ours.endswith((".q.weight", ".k.weight")):
                # llama.cpp rotates rows 2i and 2i + 1 of a head, model.py i and i + head_dim / 2
                halves = weight.unflatten(0, (-1, 2, shape.head_dim // 2))
                weight = halves.transpose(1, 2).reshape(weight.shape)
            file.add_tensor(names.get_name(theirs[ours], (".weight",)), weight.numpy())
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()


def export(trained: Trained, folder: Path) -> None:
    """Write the folder or the file, as a whole or not at all. Raises UserError, in one line."""
    if folder.exists():
        raise UserError(f"{folder}: exists; give another --to")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as aside:
            new = Path(aside) / folder.name
            (write_gguf if folder.suffix.lower() == ".gguf" else write_folder)(trained, new)
            new.rename(folder)
    except Exception as error:  # of the system, transformers or safetensors
        raise UserError(f"{folder}: cannot be written: {shorten(str(error), 300)}") from error


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=expanded, help="a run's folder")
    parser.add_argument("--to", type=expanded, required=True, help="a folder, or a file *.gguf")
    args = parser.parse_args(argv)
    trained = load_trained(args.out_dir)
    export(trained, args.to)
    print(f"{args.to}: a Llama of {n_parameters(trained.model.config):,} parameters")


if __name__ == "__main__":
    raise SystemExit(main())
