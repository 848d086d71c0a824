"""Predict the behaviour from activations."""
