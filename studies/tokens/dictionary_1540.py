# The lab on 1,540 tokens for each final parameter, as many as in the paper: 10.8 times its
# steps. The rate and the window are those of 568.
from studies.tokens.dictionary_568 import arms as shorter

base = "configs/lab/idea.py"

longer = {"max_steps": 43240, "warmup_steps": 1080, "prune_every": 1080, "eval_every": 50000}

arms = {
    "idea": shorter["idea"] | longer,
    "scratch_flops": shorter["scratch_flops"] | longer | {"max_steps": 49410},
}
