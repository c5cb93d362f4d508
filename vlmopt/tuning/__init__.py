"""Recovers accuracy after a cut, cheapest means first."""
