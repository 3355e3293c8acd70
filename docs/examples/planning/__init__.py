"""Which layout: legal ones, what a step of each takes in memory and time, the best ten."""
