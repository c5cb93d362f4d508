"""Passes that break one rule each: for every check of the harness one that it must catch."""
