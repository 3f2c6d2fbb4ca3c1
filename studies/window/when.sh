# The runs of seeds 31 to 40, for bash. forks.py trains once what the arms of a seed share.
arms=$(echo studies/window/arms.py:{idea_10_35,idea_50_75,oneshot_25,oneshot_50,oneshot_625,oneshot_75})
small=$(echo studies/window/arms.py:{scratch,scratch_flops_10_35})
for seed in {31..40}; do
    python -m studies.window.forks $seed
    python -m tools.compare $arms $small --reference=idea_10_35 --seeds=$seed-$seed --jobs=2 --compile=on \
        --runs=out/when --out=studies/window/when
done

# Exploratory, with Muon and its usual start; the rate is that of tokens/dictionary_568.py
python -m tools.compare studies/window/arms.py:{idea_10_35,idea_50_75,oneshot_50,scratch} --optimizer=muon \
    --learning_rate=1.13e-2 --reference=idea_10_35 --seeds=31-33 --jobs=2 --compile=on --out=studies/window/muon

# At this rate, which is the best of three on seeds 11 and 12 (muon/sweep.csv), more seeds
python -m tools.compare studies/window/arms.py:{idea_10_35,scratch} --optimizer=muon --learning_rate=1.13e-2 \
    --reference=idea_10_35 --seeds=34-37 --jobs=2 --compile=on --out=studies/window/muon

# Exploratory, on a plateau: in a clone with the change of exercise 7 (docs/course.md), and another rate
sed -i 's/1.13e-2/5.6e-3/' studies/window/arms.py
for seed in {31..33}; do
    python -m studies.window.forks $seed
    python -m tools.compare studies/window/arms.py:{idea_10_35,idea_50_75,oneshot_50,oneshot_75,scratch} \
        --reference=idea_10_35 --seeds=$seed-$seed --jobs=2 --compile=on --runs=out/when --out=studies/window/plateau
done
