"""What is trained and by which loss: Lightning modules, optimizer, ranks, counters, loggers, callbacks."""
