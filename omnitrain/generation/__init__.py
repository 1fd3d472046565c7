"""A trained model answers: caches, sampling, text for many prompts at once, streamed speech."""
