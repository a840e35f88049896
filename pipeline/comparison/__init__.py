"""The students of one run or of several runs next to each other: what differs, and their figures."""
