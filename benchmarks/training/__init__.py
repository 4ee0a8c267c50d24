"""Trains small networks with many optimizers on equal terms, and keeps the record."""
