"""A module after one whose last test over ranks takes more of them: what it set up is torn down on every rank."""

from __future__ import annotations

import pytest


@pytest.mark.ranks(2)
def test_in_the_next_module():
    pass
