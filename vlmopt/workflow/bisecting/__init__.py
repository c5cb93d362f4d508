"""Finds the one site of a recipe after which something is wrong, and writes it out as a failing case."""
