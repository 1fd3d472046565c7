"""From a command line, a recipe or a run folder to one typed, checked configuration; nothing heavy is imported."""
