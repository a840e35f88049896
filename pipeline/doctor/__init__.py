"""`python -m pipeline doctor`: checks of this machine and of a run before it starts."""
