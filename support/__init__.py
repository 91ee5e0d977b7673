"""Files, checkpoints, records, the tiny world, ranks, workers, errors: what a reader of the method can skip."""
