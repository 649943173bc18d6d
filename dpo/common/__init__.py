"""Code shared by all packages of `dpo`: errors, files, processes, the default model and data."""
