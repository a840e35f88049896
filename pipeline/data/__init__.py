"""From sample numbers to batches of token ids, and the held-out rows."""
