"""`python -m pipeline plan`: what a run needs, predicted before anything starts. docs/planning.md describes the model."""
