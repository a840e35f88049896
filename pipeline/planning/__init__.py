"""`python -m pipeline plan`: what a run will need before anything is started. The model is docs/planning.md."""
