"""The claims of this study, from its runs.csv: python -m studies.optimizer.claims"""

from pathlib import Path
from statistics import mean, stdev

from tools.results import paired, read_csv, t_test


def main() -> None:
    arms = read_csv(Path(__file__).with_name("runs.csv"))
    for small in ("scratch", "scratch_flops"):
        leads = {}
        for optimizer in ("adamw", "muon"):
            ours, theirs = arms.get(f"idea_{optimizer}", {}), arms.get(f"{small}_{optimizer}", {})
            leads[f"{small} minus idea, {optimizer}"] = paired(theirs, ours)
        adamw, muon = leads.values()
        leads["the lead with muon minus that with adamw"] = [b - a for a, b in zip(adamw, muon)]
        for name, lead in leads.items():
            if len(lead) > 1:
                spread = (
                    f"{mean(lead):+.4f} ± {stdev(lead):.4f}, {sum(x > 0 for x in lead)} above 0"
                )
                print(f"{name}: {len(lead)} pairs, {spread}, p = {t_test(lead):.2g}")


if __name__ == "__main__":
    main()
