"""Scripts that turn freely licensed packages into shards: ``python -m data_prep.NAME --out FOLDER``. See README.md."""
