import jax
import pytest
from jax.sharding import PartitionSpec

from tokmat_jax.config import MeshConfig
from tokmat_jax.distributed import mesh as sharding
from tokmat_jax.errors import ConfigError


def test_minus_one_takes_the_devices_that_are_left():
    assert dict(sharding.make_mesh(MeshConfig(data=-1, fsdp=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 1}


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(data=-1, fsdp=3), MeshConfig(data=8)], ids=str)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config):
    with pytest.raises(ConfigError, match=r"does not fit 4 device"):
        sharding.make_mesh(config)


def test_the_first_rule_that_matches_places_a_parameter():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    head = {"kernel": jax.ShapeDtypeStruct((8, 8), "float32"), "bias": jax.ShapeDtypeStruct((8,), "float32")}
    shapes = {"blocks": {"query": {"kernel": jax.ShapeDtypeStruct((3, 8, 6), "float32")}}, "head": head}
    placed = sharding.place(shapes, mesh)
    assert placed["blocks"]["query"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert placed["head"]["kernel"].spec == PartitionSpec("fsdp")
    assert placed["head"]["bias"].spec == PartitionSpec()
