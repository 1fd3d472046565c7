"""Public benchmarks in their own formats: readers, published scoring rules, one run that can be resumed."""
