"""docs/keys.md says what the dataclasses say."""

import importlib.util
from pathlib import Path

from omnitrain.config.compose import run_config
from omnitrain.config.typed import leaves, plain

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_keys_is_fresh() -> None:
    spec = importlib.util.spec_from_file_location("make_keys", DOCS / "make_keys.py")
    assert spec is not None
    assert spec.loader is not None
    make_keys = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_keys)
    page = make_keys.page()
    assert (DOCS / "keys.md").read_text(encoding="utf-8") == page, "run python docs/make_keys.py"
    for key in dict(leaves(plain(run_config(["+recipe=quickstart"])))):
        if key.startswith(("model", "optim", "trainer", "module.loss", "paths")) and "_target_" not in key:
            parts = key.split(".")  # a mapping that is open for keys stands on the page itself
            assert any(f"`{'.'.join(parts[:n])}`" in page for n in range(2, len(parts) + 1)), key
