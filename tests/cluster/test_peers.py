"""Errors of ranks as the router passes them on."""

from ray.exceptions import RayTaskError

from ostro.actors.errors import CheckpointError, ShardLostError
from ostro.cluster.peers import address_in, with_place
from ostro.configs.errors import ConfigError


def test_a_file_that_is_missing_on_one_node_is_missing_there():
    error = with_place(CheckpointError("no such file: /m"), "ostro-expert-2", "10.0.0.3")
    assert str(error) == error.message == "ostro-expert-2 on 10.0.0.3: no such file: /m"
    assert str(with_place(error, "ostro-router", "10.0.0.1")) == error.message


def test_a_config_error_keeps_its_kind():
    error = with_place(ConfigError("no GPU"), "ostro-expert-2", "10.0.0.3")
    assert isinstance(error, ConfigError)
    assert str(error) == "ostro-expert-2 on 10.0.0.3: no GPU"


def test_an_error_that_names_its_rank_stays_as_it_is():
    error = ShardLostError("lost ostro-expert-1")
    assert with_place(error, "ostro-router", "10.0.0.1") is error
    assert str(error) == "lost ostro-expert-1"


def test_address_in_finds_the_node_in_what_ray_raises():
    text = "ray::Shard.start() (pid=7, ip=10.0.0.3, actor_id=ab)\nno such file: /m"
    raised = RayTaskError("start", text, CheckpointError("no such file: /m"), ip="10.0.0.3")
    assert address_in(raised.as_instanceof_cause()) == "10.0.0.3"


def test_address_in_admits_that_it_does_not_know():
    raised = RayTaskError("start", "no such file: /m", CheckpointError("/m"), ip="10.0.0.3")
    assert address_in(raised.as_instanceof_cause()) == "an unknown node"
