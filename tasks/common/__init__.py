"""Code shared by all stages and commands: paths, settings of the process, errors, git."""
