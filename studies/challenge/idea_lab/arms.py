# IDEA at the lab's size, as it is.
base = "configs/lab/idea.py"
arms = {"entry": {}}
