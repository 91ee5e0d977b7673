"""What train.py stands on: recipes and flags, models, devices, resuming, logs."""
