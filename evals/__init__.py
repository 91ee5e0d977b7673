"""What eval.py stands on: scorers, benchmarks, analyses, pictures, chat."""
