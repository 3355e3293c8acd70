"""The dispatchers, one to a file; `am_moe.dispatch` has their contract."""
