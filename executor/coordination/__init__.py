"""Agreement between ranks: the store in which they meet, calls that they make alike, the outcome of a save."""
