"""What at least two of the models are made of: attention, experts, decoder layers, positions, norms."""
