"""Tasks: data, prompt format and rewards under one name."""
