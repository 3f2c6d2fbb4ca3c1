# IDEA at the laboratory's size, as it is.
base = "configs/compare/idea.py"
arms = {"entry": {}}
