"""How a model is spread over processes, applied from outside it: meshes, shards, exchanged tokens, states."""
