"""Where a model may be cut, proved by following its values, and the part that each stage holds."""
