"""Python files of a model that go along with its export."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewarm.engine.deepspeed.export import Companions, _copy_companions
from rewarm.errors import UserError
from rewarm.model.description import HuggingFaceModel


def test_code_goes_along_and_what_a_link_leads_to_does_not(tmp_path: Path) -> None:
    folder, target = tmp_path / "model", tmp_path / "export"
    folder.mkdir()
    target.mkdir()
    (folder / "modeling.py").write_text("x = 1")
    (tmp_path / "secret").write_text("PRIVATE KEY")
    model = HuggingFaceModel({"model_type": "own"}, str(folder))
    _copy_companions(Companions(None, None), model, target)
    assert (target / "modeling.py").read_text() == "x = 1"
    (folder / "key.py").symlink_to("../secret")
    with pytest.raises(UserError, match=r"key.py is a link to .*secret, which lies outside"):
        _copy_companions(Companions(None, None), model, target)
    assert not (target / "key.py").exists()
