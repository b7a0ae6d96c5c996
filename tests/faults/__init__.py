"""Faults: torture under kills and stops, and builds of the extension that have a fault, or a stop at every step."""
