"""What a policy is worth: metrics, samples, judges."""
