"""Plans per model family, each in a file of its own."""
