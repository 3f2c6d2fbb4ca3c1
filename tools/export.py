"""A run as a Hugging Face folder: python -m tools.export OUT_DIR --to FOLDER

The folder is a plain LlamaForCausalLM, which transformers and what builds on it load without our
code. Needs: pip install -r requirements-extra.txt
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from torch import Tensor

from data.tokenizer import END_OF_TEXT, tokenizer_files
from data.tokenizer_json import from_tiktoken
from model import GPTConfig
from run import UserError
from run.config import Config
from run.cost import n_parameters
from run.folder import read_log
from run.llama import one_line, write_llama
from tools import command
from tools.load import load_trained

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A language model in the shape of Llama: {parameters:,} parameters.

| | |
| --- | --- |
| data | {data} |
| training | {step} of {max_steps} steps, {tokens:,} tokens |
| validation | {loss} |

A special token that stands in a text, such as `{end}`, becomes its id; training had it as text.
`split_special_tokens=True` gives the ids of training. Token ids from {n_tokens} on, where there are
any, only pad the vocabulary.
"""


def as_json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def write_folder(
    folder: Path, shape: GPTConfig, weights: dict[str, Tensor], ids: dict[str, int], n_tokens: int,
    tokenizer: bytes, settings: dict, card: str,
) -> None:  # fmt: skip
    """Write a folder as a whole or not at all. Raises UserError.

    tokenizer: tokenizer.json. settings: what tokenizer_config.json says beside the usual. card:
    README.md. The rest: see write_llama.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists; give another --to")
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 has another, too
        **settings,
        "model_max_length": shape.context_length,
    }
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": as_json(about)}
    files["README.md"] = card.encode()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as aside:
            made = Path(aside) / folder.name
            write_llama(made, shape, weights, ids, n_tokens)
            for name, content in files.items():
                (made / name).write_bytes(content)
            made.rename(folder)
    except Exception as error:  # of the system, transformers or safetensors
        raise UserError(f"{folder}: cannot be written: {one_line(error)}") from error


def export(out_dir: Path, folder: Path) -> GPTConfig:
    """Write the folder. Returns its shape. Raises UserError or DataError, in one line."""
    trained = load_trained(out_dir)
    if "config" not in trained.state:
        raise UserError(f"{out_dir}: is a Hugging Face folder already")
    shape, step, c = trained.model.config, trained.state["step"], Config(**trained.state["config"])
    loss = "none yet"
    for e in read_log(out_dir):
        if e["event"] == "eval" and e["step"] <= step:
            loss = f"{e['val_loss']:.4f} nats per token, {e['val_bpb']:.4f} bits per byte"
    card = CARD.format(
        name=folder.name, parameters=n_parameters(shape), data=Path(c.data_dir).name, step=step,
        max_steps=c.max_steps, tokens=step * c.batch_size * c.context_length, loss=loss,
        end=END_OF_TEXT, n_tokens=trained.vocab_size,
    )  # fmt: skip
    ids = dict.fromkeys(("bos", "eos", "pad"), trained.end_of_text)
    ids |= getattr(trained.tokenizer, "specials", {})  # others end otherwise
    own = tokenizer_files(trained.tokenizer_name)
    if "tokenizer.json" in own:
        tokenizer = own["tokenizer.json"].read_bytes()
        about = own.get("tokenizer_config.json")
        settings = json.loads(about.read_bytes()) if about else {}
    else:
        tokenizer = as_json(from_tiktoken(trained.tokenizer))
        settings = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    weights = trained.model.cpu().state_dict()
    write_folder(folder, shape, weights, ids, trained.vocab_size, tokenizer, settings, card)
    return shape


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", type=Path, help="a run's folder")
    parser.add_argument("--to", type=Path, required=True, help="the folder to make")
    args = parser.parse_args(argv)
    shape = export(args.out_dir, args.to)
    print(f"{args.to}: LlamaForCausalLM, {n_parameters(shape):,} parameters")


if __name__ == "__main__":
    sys.exit(main())
