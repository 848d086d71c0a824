"""What one neuron does."""
