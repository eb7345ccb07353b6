"""What one rank's failure is on the others."""

from __future__ import annotations

import pytest

from rewarm.engine import ranks
from rewarm.errors import NodeFault, UserError


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NodeFault("gpu7", "a drive failed"), NodeFault),
        (UserError("no", fix="yes"), UserError),
        (OSError(28, "full"), OSError),
        (KeyError("x"), RuntimeError),
    ],
)
def test_every_rank_ends_alike(error: Exception, status: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher takes the status of the rank that ends first, which need not be the one that failed."""
    monkeypatch.setattr(ranks, "any_rank", lambda flag: True)
    monkeypatch.setattr(ranks, "gather", lambda value: [ranks._summary(error), value])
    with pytest.raises(status) as other:
        ranks.raise_on_every_rank(None)
    assert type(other.value) is status
    if status is not RuntimeError:
        assert str(other.value) == str(error)
