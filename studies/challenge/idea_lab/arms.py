# IDEA at the laboratory's size, as it is.
base = "configs/lab/idea.py"
arms = {"entry": {}}
