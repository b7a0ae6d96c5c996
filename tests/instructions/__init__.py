"""Counts of the instructions that the extension takes for one operation."""
