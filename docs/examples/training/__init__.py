"""The rooms of `train.py`: model, text, degrees, layout, report; and what lets a run survive: session, agreement,
watch, start, checkpoint, manifest."""
