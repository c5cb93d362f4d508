"""Measurements that claims are quoted from. `make bench` runs them all and writes `results/`."""
