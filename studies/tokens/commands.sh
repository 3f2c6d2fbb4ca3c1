# How each folder came to be, for bash. Behind each line: its folder, the commit at which it ran,
# where paths were others, and the CPU, if not an AMD EPYC Zen 5. Xeon: Intel, Sapphire Rapids; MKL:
# a Zen 5 with MKL's kernels for AVX-512 (studies/speed). data/gcide: studies/texts. To repeat one:
# studies/README.md.
# Each rate is the best on seeds 11 and 12 (sweep.csv), at lab_71 and lab on 11 only, at lab_36 to
# within 0.001. At lab_71 and dictionary_1540, it is the highest that was tried. scratch has the rate
# of scratch_flops, and speeches_568 the dictionary's. The default size keeps its rate with 65 and
# 142 tokens, and is not tuned with 569. With 568, the window from 25 to 50% ends as low as a later
# one, for fewer FLOPs.
lab=$(echo configs/lab/{idea,scratch,scratch_flops}.py)
compare="python -m tools.compare"

$compare studies/tokens/lab_18.py --shorter=8 --seeds 5  # lab_18, b1c3cda
$compare $lab --shorter=4 --learning_rate=3.2e-2 --seeds 5  # lab_36, b1c3cda
$compare $lab --shorter=2 --learning_rate=3.2e-2 --seeds 3  # lab_71, b1c3cda
$compare studies/tokens/default_65.py --seeds 2  # default_65, b1c3cda; without scratch: 3
$compare studies/tokens/default_142.py --seeds 2  # default_142, 6e45041; without scratch: 5
$compare configs/{idea,scratch,scratch_flops}.py --data_dir=data/gcide --seeds 2  # dictionary_default_16, 5489e29
$compare studies/tokens/default_142.py:{idea,scratch_flops} --data_dir=data/gcide --seeds 2  # dictionary_default_142, 6e45041
$compare $lab --data_dir=data/gcide  # dictionary_142_untuned, e11c9f9
both="--learning_rate=2.26e-2 --data_dir=data/gcide --dtype=float32 --eval_every=4000"
$compare configs/lab/{idea,scratch_flops}.py $both --seeds 10  # dictionary_142, b06f3b1, Xeon; then, MKL:
$compare $lab configs/lab/{oneshot,naive}.py studies/lab/ablations.py:{oneshot_10,naive_25} $both --seeds 5
$compare studies/tokens/dictionary_568.py --seeds 5  # dictionary_568, 77f342f, Xeon, scratch MKL; without scratch: 10
$compare studies/tokens/dictionary_568.py --data_dir=data/sotu --seeds 5  # speeches_568, 77f342f, MKL
$compare studies/tokens/default_568.py --seeds 3  # dictionary_default_568, 70f85e0, MKL
$compare studies/tokens/dictionary_1540.py --seeds 10  # dictionary_1540, 24b43ba, Xeon
# size, in sweep.csv; d72f3bb, cafd5ac, 6e45041; most on a Zen 3, 40 minutes a run
$compare studies/tokens/size.py --seeds 2 --dtype=float32
