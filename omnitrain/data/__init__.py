"""From Parquet shards or a user's own files to packed batches: samples, media, chat, positions, mixture, packing."""
