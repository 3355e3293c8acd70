"""Helpers for tests that run on several ranks. The pytest plugin is `am_testkit.plugin`."""
