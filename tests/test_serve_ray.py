"""A real Ray cluster of this machine: two replicas, one of which is killed with -9 under load."""

from __future__ import annotations

import pytest

from minioscar.app.ray_app import build
from minioscar.errors import UserError

from .tiny import write_talker

pytest.importorskip("ray.serve", reason="Ray Serve is not installed (pip install 'minioscar[ray]')")
from .cluster import Replay, measured, passed  # noqa: E402

LOAD = Replay(agents=4, turns=4, system=384, task=128, new=16, result=64, lasting=700)


def test_the_target_of_serve_run_takes_the_options_of_the_command(tmp_path):
    folder = write_talker(tmp_path / "tiny", 3, num_hidden_layers=1)
    options = {"model": str(folder), "device": "cpu", "slots": "2", "replicas": "1:3", "max_model_len": "5"}
    with pytest.raises(UserError, match="--max-model-len"):
        build(options)
    del options["max_model_len"]
    replica = build(options)._bound_deployment.init_args[0]._bound_deployment
    assert replica.name == "replica" and replica.max_ongoing_requests == 3


def test_two_replicas_hit_stream_free_their_rows_and_come_back(tmp_path):
    folder = write_talker(tmp_path / "tiny", 3, num_hidden_layers=1, max_position_embeddings=8192)
    report = measured(str(folder), LOAD, vocab=250, seed=1)
    assert report["hits_of_single"] >= 0.8, report
    assert report["cluster"]["left_s"] < 10
    assert report["killed"]["ended"].keys() == {"whole", "error"}, report
    assert report["killed"]["later_ended"].keys() == {"whole"} and passed(report), report
