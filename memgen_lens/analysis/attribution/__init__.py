"""Which neurons differ between the two behaviours, and which make the difference."""
