"""Text to memory-mapped token shards. Imports neither torch nor DeepSpeed nor the training package."""
