# The lab, alone and with the never-pruned enlarged model as its teacher.
base = "configs/lab/idea.py"

scratch = {"d_ff": 96, "d_ff_target": 0, "learning_rate": 3.2e-2}
teacher = {"teacher": "out/teacher", "teacher_weight": 0.25}  # the better of two weights

arms = {
    "idea": {},
    "idea_taught": teacher,
    "scratch": scratch,
    "scratch_taught": scratch | teacher,
}
