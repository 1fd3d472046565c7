"""The model as plain ``nn.Module`` classes on packed tensors; they know no trainer, configuration or data."""
