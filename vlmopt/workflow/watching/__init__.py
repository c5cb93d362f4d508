"""Observers around passes: what a user may watch of a run, which changes nothing about it."""
