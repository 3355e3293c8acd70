"""In what order the stages run their microbatches, simulated, balanced and drawn."""
