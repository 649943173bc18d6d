"""Training on preference pairs of the policy's own responses."""
