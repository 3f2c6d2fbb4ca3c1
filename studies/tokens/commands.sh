# How each setting came to be, for bash. Behind each line: its setting, the commit at which it ran,
# where paths were others, and the CPU, if not an AMD EPYC Zen 5. Xeon: Intel, Sapphire Rapids; MKL:
# a Zen 5 with MKL's kernels for AVX-512 (studies/speed). data/gcide: studies/texts. To repeat one:
# studies/README.md.
# Each rate is the best on seeds 11 and 12 (studies/sweeps.csv), of speeches_71 and speeches_142 on
# 11 only, of speeches_36 to within 0.001. Of speeches_71 and dictionary_1540, it is the highest that
# was tried. scratch has the rate of scratch_flops, and speeches_568 the dictionary's. 250k keeps the
# rate of 16 tokens with 65 and 142, and is not tuned with 569. With 568, the window from 25 to 50%
# ends as low as a later one, for fewer FLOPs.
three=$(echo configs/{idea,scratch,scratch_flops}.py)
compare="python -m tools.compare"

$compare studies/arms.py:speeches_18 --shorter=8 --seeds 5  # speeches_18, b1c3cda
$compare $three --shorter=4 --learning_rate=3.2e-2 --seeds 5  # speeches_36, b1c3cda
$compare $three --shorter=2 --learning_rate=3.2e-2 --seeds 3  # speeches_71, b1c3cda
$compare studies/arms.py:speeches_65_250k --seeds 2  # speeches_65_250k, b1c3cda; without scratch: 3
$compare studies/arms.py:speeches_142_250k --seeds 2  # speeches_142_250k, 6e45041; without scratch: 5
$compare studies/arms.py:speeches_16_250k:{idea,scratch,scratch_flops} --data_dir=data/gcide --seeds 2  # dictionary_16_250k, 5489e29
$compare studies/arms.py:speeches_142_250k:{idea,scratch_flops} --data_dir=data/gcide --seeds 2  # dictionary_142_250k, 6e45041
$compare $three --data_dir=data/gcide  # dictionary_142_untuned, e11c9f9
both="--learning_rate=2.26e-2 --data_dir=data/gcide --dtype=float32 --eval_every=4000"
$compare configs/{idea,scratch_flops}.py $both --seeds 10  # dictionary_142, b06f3b1, Xeon; then, MKL:
$compare $three configs/{oneshot,naive}.py studies/arms.py:changes:{oneshot_10,naive_25} $both --seeds 5
$compare studies/arms.py:dictionary_568 --seeds 5  # dictionary_568, 77f342f, Xeon, scratch MKL; without scratch: 10
$compare studies/arms.py:dictionary_568 --data_dir=data/sotu --seeds 5  # speeches_568, 77f342f, MKL
$compare studies/arms.py:dictionary_568_250k --seeds 3  # dictionary_568_250k, 70f85e0, MKL
$compare studies/arms.py:dictionary_1540 --seeds 10  # dictionary_1540, 24b43ba, Xeon
# speeches_16_870k, in studies/sweeps.csv; d72f3bb, cafd5ac, 6e45041; most on a Zen 3, 40 minutes a run
$compare studies/arms.py:speeches_16_870k --seeds 2 --dtype=float32
