"""Conversion between checkpoints, `torch.save` files and safetensors."""
