"""The tiny world: `python -m tiny`, and the models that ship."""
