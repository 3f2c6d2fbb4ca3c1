# The runs of README.md, for bash, with commit and AMD EPYC. To repeat one: studies/README.md.
python -m studies.limited.make data/sotu --tokens=172512 --to=data/sotu_3
# Here: 754335a, Zen 4; oneshot, too, with --seeds 3
python -m tools.compare studies/limited/arms.py:{idea,scratch,scratch_flops} --seeds 5
# float32/: cafd5ac, Zen 3; the small models, too, on two seeds
python -m tools.compare studies/limited/arms.py:{idea,oneshot,naive,paper} --seeds 3 --dtype=float32
# twelve/: c906d16, Zen 5
python -m studies.limited.make data/sotu --tokens=690048 --to=data/sotu_12
python -m tools.compare configs/lab/{idea,scratch_flops}.py --data_dir=data/sotu_12 --learning_rate=2.26e-2 --weight_decay=0.1
