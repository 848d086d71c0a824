"""Prompts that flip, and what a model's neurons do at their answer position."""
