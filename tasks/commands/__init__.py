"""The commands of the console script `dpo`, one module each; `cli` declares their arguments."""
