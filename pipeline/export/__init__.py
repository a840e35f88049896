"""Run directory to a Hugging Face checkpoint."""
