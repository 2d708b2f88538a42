"""How the model of `recipes/squares.yaml` is made: `python -m recipes.squares` from the root of the repository."""
