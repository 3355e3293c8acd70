"""FSDP2 for models with experts, whose parameters are on a mesh of their own."""
