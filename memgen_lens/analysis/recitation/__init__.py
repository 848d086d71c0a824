"""Verbatim recitation: measured, put into pairs, steered away."""
