"""Registries: names, mistakes, and entries that are replaced for a while."""
import pytest

from dnnlib import UserError
from dnnlib.registry import Registry


@pytest.fixture
def colours():
    registry: Registry[int] = Registry("colour")
    registry.register("red")(1)
    registry.register("blue")(2)
    return registry


def test_names(colours):
    assert (list(colours), colours["blue"], "green" in colours) == (["red", "blue"], 2, False)
    with pytest.raises(UserError, match="unknown colour 'green': choose from blue, red"):
        colours["green"]
    with pytest.raises(KeyError, match="colour 'red' is registered twice"):
        colours.register("red")(3)


def test_replaced_entries_come_back(colours):
    with colours.replaced("red", 7), colours.replaced("green", 8):
        assert [colours[name] for name in colours] == [7, 2, 8]
    assert [colours[name] for name in colours] == [1, 2]
    with pytest.raises(RuntimeError, match="inside"), colours.replaced("red", 7):
        raise RuntimeError("inside")
    assert colours["red"] == 1
