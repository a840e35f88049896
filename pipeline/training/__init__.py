"""From a recipe to a finished run: parts, loop, resume, log."""
