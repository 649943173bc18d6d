"""Metrics, sampling, judges and the choice of a policy."""
