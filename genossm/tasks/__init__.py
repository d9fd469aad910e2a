"""Tasks: head, loss and metrics over a backbone; nothing else."""
