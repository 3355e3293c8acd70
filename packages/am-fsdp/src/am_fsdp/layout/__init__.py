"""A model on a mesh: what is a unit, what is sharded, recomputed, clipped, and shared by replicas."""
