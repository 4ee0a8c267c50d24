"""Measures what a step costs, beside other optimizers and on the same machine."""
