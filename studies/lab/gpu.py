# The arms of configs/lab/ at sixteen times the final size, for a GPU and text of your own (130M
# tokens or more): python -m data.prepare --tokenizer shipped --input ... --out data/fineweb
# python -m tools.compare studies/lab/gpu.py --seeds 5 --out studies/mine
base = "configs/lab/idea.py"

idea = {
    "data_dir": "data/fineweb", "n_layer": 4, "d_model": 128, "d_ff": 1024, "d_ff_target": 384,
    "max_steps": 8000, "batch_size": 64, "context_length": 256,  # 143 tokens per final parameter
    "learning_rate": 8e-3,  # a guess: sweep it, and scratch's most carefully
    "warmup_steps": 200, "prune_every": 200,
}  # fmt: skip
scratch = idea | {"d_ff": 384, "d_ff_target": 0}
oneshot = idea | {"prune_schedule": "oneshot", "prune_start": 0.25}

arms = {
    "idea": idea,
    "scratch": scratch,  # the final shape from the start, on the same tokens
    "scratch_flops": scratch | {"max_steps": 9192},  # on as many FLOPs as idea
    # Two cosines, the second with a fresh optimizer; 10% was best in configs/lab/
    "naive": oneshot | {"lr_restart": True, "prune_start": 0.1},
    "oneshot": oneshot,  # one prune under the single cosine
    "enlarged": idea | {"d_ff_target": 0},  # never pruned: the ceiling
}
