"""What shows that a plan is right: shares followed through a model, and a small twin with real numbers."""
