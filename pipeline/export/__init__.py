"""Export: a run directory becomes a Hugging Face checkpoint."""
