"""What a stage does in a step: inputs, messages, gradients, shared parameters, errors."""
