"""What all packages of `dpo` share: errors, files, processes, the default model and data."""
