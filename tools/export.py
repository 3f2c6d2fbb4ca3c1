"""A run as a Hugging Face folder: python -m tools.export OUT_DIR --to FOLDER

The folder is a plain LlamaForCausalLM, which transformers and what builds on it load without our
code. Needs: pip install -r requirements-hf.txt
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from torch import Tensor

from data.tokenizer import END_OF_TEXT, tokenizer_files
from data.tokenizer_json import from_tiktoken
from model import GPTConfig
from run import UserError
from run.config import Config
from run.cost import make_plan, n_parameters
from run.folder import read_log
from run.llama import config_json, need_safetensors, weight_names
from tools import command
from tools.load import load_run

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A language model in the shape of Llama: {parameters:,} parameters, {enlarged:,} at first.

| | |
| --- | --- |
| data | {data}: {tokens:,} training tokens |
| training | {step} of {max_steps} steps, {flops:.3g} FLOPs |
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

    weights: under our names. ids: of the special tokens bos, eos and pad. n_tokens: ids past it
    only pad the vocabulary. tokenizer: tokenizer.json. settings: what tokenizer_config.json says
    beside the usual. card: README.md.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists; give another --to")
    if shape.d_model % shape.n_head:
        possible = range(1, shape.d_model // shape.queries_per_kv + 1)
        fits = [str(n) for n in possible if shape.d_model % (n * shape.queries_per_kv) == 0]
        raise UserError(
            f"{folder}: transformers 5 asks that the number of query heads, {shape.n_head}, divide "
            f"d_model={shape.d_model}. n_kv_head={shape.n_kv_head} should be {' or '.join(fits)}"
        )
    safetensors = need_safetensors()
    tensors = {b: weights[a].float().contiguous() for a, b in weight_names(shape).items()}
    generation: dict = {f"{key}_token_id": i for key, i in ids.items()}
    if n_tokens < shape.vocab_size:
        generation["suppress_tokens"] = list(range(n_tokens, shape.vocab_size))
    usual = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 has another, too
    }
    about = usual | settings | {"model_max_length": shape.context_length}
    files = {
        "config.json": as_json(config_json(shape, ids["bos"], ids["eos"])),
        "generation_config.json": as_json(generation),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": as_json(about),
        "README.md": card.encode(),
    }
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        safetensors.torch.save_file(tensors, aside / "model.safetensors", {"format": "pt"})
        for name, content in files.items():
            (aside / name).write_bytes(content)
        aside.rename(folder)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"{folder}: cannot be written: {words}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def export(out_dir: Path, folder: Path) -> GPTConfig:
    """Write the folder. Returns its shape. Raises UserError or DataError, in one line."""
    run = load_run(out_dir)
    if "config" not in run.state:
        raise UserError(f"{out_dir}: is a Hugging Face folder already")
    shape, step, c = run.model.config, run.state["step"], Config(**run.state["config"])
    plan, loss = make_plan(c, shape.vocab_size), "none yet"
    for e in read_log(out_dir):
        if e["event"] == "eval" and e["step"] <= step:
            loss = f"{e['val_loss']:.4f} nats per token, {e['val_bpb']:.4f} bits per byte"
    card = CARD.format(
        name=folder.name, parameters=n_parameters(shape), enlarged=n_parameters(plan.enlarged),
        data=Path(c.data_dir).name, tokens=step * plan.tokens_per_step, step=step,
        max_steps=c.max_steps, flops=plan.flops(step), loss=loss, end=END_OF_TEXT,
        n_tokens=run.vocab_size,
    )  # fmt: skip
    ids = dict.fromkeys(("bos", "eos", "pad"), run.end_of_text)
    ids |= getattr(run.tokenizer, "specials", {})  # a tokenizer from elsewhere may end otherwise
    own = tokenizer_files(run.tokenizer_name)
    if "tokenizer.json" in own:
        tokenizer = own["tokenizer.json"].read_bytes()
        about = own.get("tokenizer_config.json")
        settings = json.loads(about.read_bytes()) if about else {}
    else:
        tokenizer = as_json(from_tiktoken(run.tokenizer))
        settings = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    weights = run.model.cpu().state_dict()
    write_folder(folder, shape, weights, ids, run.vocab_size, tokenizer, settings, card)
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
