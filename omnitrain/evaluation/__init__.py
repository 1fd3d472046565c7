"""A model and samples in, numbers out: losses, answers, media swaps, speech that judges have listened to."""
