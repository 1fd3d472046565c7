"""Checkpoints of others: the public Qwen3-Omni format in and out, text models, Mimi; what a training starts from."""

from omnitrain.interop.public_format import load_pretrained, save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
