"""Recipe text to values, and the ranges that values may have."""
