"""MuseConfig: validation, layer policy and round trips."""

import json

import pytest

from muse_hf import MuseConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_clusters": 0}, r"num_clusters=0: must be at least 1"),
        ({"cluster_size": -3}, r"cluster_size=-3: must be at least 1"),
        ({"num_retrieved": -1}, r"num_retrieved=-1: must be at least 0"),
        ({"local_block": 0}, r"local_block=0: must be at least 1"),
        ({"kmeans_iters": -1}, r"kmeans_iters=-1: must be at least 0"),
        ({"cluster_cap": 0.5}, r"cluster_cap=0.5: must be finite and at least 1"),
        ({"cluster_cap": float("nan")}, r"cluster_cap=nan: must be finite"),
        ({"retrieval_threshold": 1.0}, r"retrieval_threshold=1.0: is a share: at least 0 and less than 1"),
        ({"retrieval_threshold": -0.1}, r"retrieval_threshold=-0.1: is a share"),
        ({"summaries": "fancy"}, r"summaries='fancy': must be one of 'plain', 'tilted'"),
        ({"hierarchy": None}, r"hierarchy=None: must be one of"),
        ({"backend": "cuda"}, r"backend='cuda': must be one of 'auto', 'reference', 'triton'"),
        ({"num_clusters": 8, "cluster_size": 8}, r"num_clusters=8: excludes cluster_size=8"),
        ({"num_clusters": 65, "local_block": 64}, r"num_clusters=65: must be at most local_block=64"),
        ({"cluster_size": 65, "local_block": 64}, r"cluster_size=65: must be at most local_block=64"),
        ({"multipole": "dipole"}, r"multipole='dipole': needs summaries=\"tilted\""),
        ({"query_centroids": "own"}, r"query_centroids='own': needs summaries=\"tilted\""),
        (
            {"summaries": "tilted", "query_centroids": "own"},
            r"query_centroids='own': needs hierarchy=\"dyadic\"",
        ),
        ({"layers": {0: {"num_retrieved": -1}}}, r"layers\[0\]: MuseConfig.num_retrieved=-1"),
        ({"layers": {0: {"depth": 3}}}, r"has no field 'depth'"),
    ],
)
def test_bad_values_are_named_with_their_rule(fields, message):
    with pytest.raises(ValueError, match=message):
        MuseConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_clusters": 4.0},
        {"num_retrieved": True},
        {"cluster_cap": "1.5"},
        {"retrieval_threshold": None},
        {"layers": "all"},
        {"layers": ["first"]},
        {"layers": {0: 5}},
        {"layers": {0: {"layers": [1]}}},
    ],
)
def test_wrong_types_are_refused(fields):
    with pytest.raises(TypeError, match=r"MuseConfig"):
        MuseConfig(**fields)


def test_number_and_capacity_of_clusters():
    assert MuseConfig().clusters_for(1024) == 26, "40 keys a cluster by default"
    assert MuseConfig(num_clusters=64).clusters_for(8192) == 64
    assert MuseConfig(num_clusters=64).clusters_for(40) == 40, "no more clusters than tokens"
    config = MuseConfig(cluster_size=32, cluster_cap=1.5)
    assert config.clusters_for(1000) == 32
    assert config.capacity_for(1000) == 47
    assert config.capacity_for(1000) * config.clusters_for(1000) >= 1000
    assert config.replace(cluster_cap=None).capacity_for(1000) == 1000, (
        "without a cap one cluster may take them all"
    )


def test_paper_setting():
    paper = MuseConfig.paper()
    assert (paper.num_clusters, paper.num_retrieved, paper.local_block) == (64, 0, 8192)
    assert (paper.summaries, paper.hierarchy, paper.multipole) == ("tilted", "dyadic", "dipole")
    assert paper.cluster_cap is None
    assert MuseConfig.paper(local_block=4096).local_block == 4096
    assert MuseConfig.paper(cluster_size=64).num_clusters is None, "a size takes the place of the number"


def test_the_description_tells_of_a_setting_that_leaks():
    assert "leak" not in MuseConfig.paper().describe()
    assert "later tokens leak into earlier ones" in MuseConfig.paper(query_centroids="own").describe()


@pytest.mark.parametrize("layers", [None, [0, -1], {2: {"num_retrieved": 64}, -1: {"num_clusters": 16}}])
def test_round_trip_through_json(layers):
    config = MuseConfig(cluster_size=16, layers=layers)
    assert MuseConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match=r"no field 'num_cluster'"):
        MuseConfig.from_dict({"num_cluster": 3})


def test_layers_and_overrides():
    config = MuseConfig(cluster_size=16, layers={1: {"num_retrieved": 64}, -1: {"num_clusters": 8}})
    assert config.layer_indices(4) == [1, 3]
    assert config.for_layer(0, 4) is None, "a layer that is not named attends exactly"
    assert config.for_layer(1, 4) == MuseConfig(cluster_size=16, num_retrieved=64)
    assert config.for_layer(3, 4) == MuseConfig(num_clusters=8), (
        "one way to count clusters replaces the other"
    )
    assert MuseConfig().layer_indices(3) == [0, 1, 2]
    assert MuseConfig(layers=[-1, 0]).layer_indices(3) == [0, 2]


@pytest.mark.parametrize(
    ("layers", "message"), [([7], "layer 7 is out of range"), ([-8], "layer -8 is out"), ([6, -1], "twice")]
)
def test_layers_that_a_model_does_not_have(layers, message):
    with pytest.raises(ValueError, match=message):
        MuseConfig(layers=layers).layer_indices(7)
