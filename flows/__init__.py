"""What happens in which order: the flow, its runs, its servers and the `conta` command."""
