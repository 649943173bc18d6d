"""Text to log-probs: tokenization, packing, the log-prob engine and the reference cache."""
