"""Runs passes: clones, applies site by site under a fuel limit, and checks what every pass must leave intact."""
