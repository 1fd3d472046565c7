"""Run folders: who owns one, what is built from its configuration or loaded from it, stages in order."""
