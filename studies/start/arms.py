# The lab with Muon, from two starts of the weights (README.md). `_usual`: normal, std 0.02, as
# init_weights has it. `_width`: by_width.patch is applied first.
base = "configs/lab/idea.py"

common = {"dtype": "float32", "compile": "on", "eval_every": 4000, "save_every": 500}
idea = common | {"learning_rate": 1.6e-2}
scratch = common | {"d_ff": 96, "d_ff_target": 0, "learning_rate": 3.2e-2}
scratch_flops = scratch | {"max_steps": 4321}

arms = {
    "idea_usual": idea,
    "scratch_usual": scratch,
    "scratch_flops_usual": scratch_flops,
    "idea_width": idea,
    "scratch_width": scratch,
    "scratch_flops_width": scratch_flops,
}
