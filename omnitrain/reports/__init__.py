"""Pages made from what lies in run folders; nothing here needs a model."""
