"""The rooms of `train.py`: degrees, text, model, layout, checkpoint, report."""
