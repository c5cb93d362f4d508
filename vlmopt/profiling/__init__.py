"""Measures what every branch and layer is worth for a task."""
