"""Reading recipe text, and the ranges of recipe values."""
