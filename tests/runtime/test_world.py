"""A process finds its place from what the launchers export."""

import pytest

from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.world import World


def test_plain_process_is_alone():
    assert World.from_environment({}) == World(0, 1, 0)
    assert World.from_environment({}).is_first


def test_launched_process():
    assert World.from_environment({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == World(5, 8, 1)


@pytest.mark.parametrize("environment", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}])
def test_impossible_places_are_refused(environment):
    with pytest.raises(InputError, match="is not a place"):
        World.from_environment(environment)
