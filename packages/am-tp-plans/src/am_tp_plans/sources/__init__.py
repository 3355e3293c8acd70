"""Where plans come from: families, transformers' strings, a model's structure, sequence parallelism."""
