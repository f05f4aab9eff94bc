"""What `xlstm_rl` offers without deep imports."""

from __future__ import annotations

import pytest

import xlstm_rl


@pytest.mark.parametrize("name", xlstm_rl.__all__)
def test_public_name_is_there_and_listed(name: str) -> None:
    assert getattr(xlstm_rl, name) is not None
    assert name in dir(xlstm_rl)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="xlstm_rl.*'nothing'"):
        _ = xlstm_rl.nothing
