"""Sample numbers to batches of token ids."""
