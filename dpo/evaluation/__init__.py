"""Metrics, sampling, judges and the selection of a policy."""
