"""The experiments behind the claims of `docs/internals/evidence.md`: `python -m benchmarks.evidence`."""
