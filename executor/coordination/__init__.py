"""Agreement between ranks: the store in which they meet, their calls, the outcome of a save."""
