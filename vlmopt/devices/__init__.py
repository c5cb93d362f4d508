"""What operations cost on a device: which ones a graph runs, how long each takes there, and what they take together."""
