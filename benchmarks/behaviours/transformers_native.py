"""transformers' own adapter methods, auto classes and pipelines."""
