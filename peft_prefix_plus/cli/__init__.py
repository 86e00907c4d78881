"""The console script `prefix-plus`: one module a command."""
