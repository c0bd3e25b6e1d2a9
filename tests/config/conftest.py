from __future__ import annotations

from pathlib import Path

import pytest

from .files import Files


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """Run in an empty directory, so that messages read `model.yaml:3: …`."""
    monkeypatch.chdir(tmp_path)
    return Files(tmp_path)
