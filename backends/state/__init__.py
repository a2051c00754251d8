"""The state of a training run: values, checked before a save and loaded without running what they say."""
