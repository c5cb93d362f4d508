"""Importance and budgets -> chosen sites."""
