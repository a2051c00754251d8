"""What a state may hold, and how it is stored: tensors, values and containers."""
