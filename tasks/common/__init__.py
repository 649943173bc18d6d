"""What all stages and commands share: paths and how they start."""
