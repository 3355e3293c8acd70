"""The rooms of `verify.py`: the model and its shrinking, conditions, the comparison with one process, the report."""
