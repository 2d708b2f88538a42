"""How the embedded model is made: `python -m recipes.tiny` from the root of the repository."""
