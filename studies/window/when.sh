# The runs of README.md, "When", for bash. forks.py trains once what the arms of a seed share.
arms=$(echo studies/window/arms.py:{idea_10_35,idea_50_75,oneshot_25,oneshot_50,oneshot_625,oneshot_75})
small=$(echo studies/window/arms.py:{scratch,scratch_flops_10_35})
for seed in {31..40}; do
    python -m studies.window.forks $seed
    python -m tools.compare $arms $small --reference=idea_10_35 --seeds=$seed-$seed --jobs=2 --compile=on \
        --runs=out/when --out=studies/window/when
done
