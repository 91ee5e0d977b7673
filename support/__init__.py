"""Files, checkpoints, records, tiny world, ranks, workers, errors: what a reader of the method can skip."""
