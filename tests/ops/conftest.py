"""Every test of an operation names the form that it tests."""
import pytest


@pytest.fixture(autouse=True)
def _native_forms_are_there(monkeypatch):
    """The environment of the suite may ask for reference operations; here native ones are tested all the same."""
    monkeypatch.delenv("STYLESAN_OPS", raising=False)
