"""Which neurons differ between the two behaviours."""
