"""Compares numbers: graphs with graphs, artifacts with programs, models on a task."""
