"""Checkpoints and layouts, records, the tiny world, ranks, errors: what a reader of the method can skip."""
