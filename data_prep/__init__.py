"""Text to memory-mapped token shards. Knows nothing of torch, DeepSpeed or training."""
