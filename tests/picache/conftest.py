"""What tests of captured passes share: passes are recorded on a CPU too, where they run again."""

import pytest

from picache.hf import recorders


@pytest.fixture
def captured(monkeypatch):
    """Passes are recorded on a CPU too: they run again each time."""
    monkeypatch.setitem(recorders.RECORDERS, "cpu", recorders.RunAgain)


@pytest.fixture
def eagerly(monkeypatch):
    """A function that links without the recording."""

    def link(pic, *args):
        with pytest.MonkeyPatch.context() as patch:
            patch.delitem(recorders.RECORDERS, "cpu", raising=False)
            prompt = pic.link(*args)
        assert not prompt.report.recompute_pass.startswith("captured,")
        return prompt

    return link
