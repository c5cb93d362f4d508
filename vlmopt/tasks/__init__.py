"""Tasks: a folder of the user's own data becomes samples, inputs, losses and metrics."""
