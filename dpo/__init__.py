"""Direct Preference Optimization: losses, log-probs, batching, training and evaluation.

This package knows nothing of files' whereabouts, orchestration or experiment tracking; those live in
`tasks` and `flows`, which import it and are never imported by it.
"""
