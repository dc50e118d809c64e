"""A real Ray cluster of this machine: two replicas, one of which is killed with -9 under load."""

from __future__ import annotations

import pytest

from .tiny import write_talker

pytest.importorskip("ray.serve", reason="Ray Serve is not installed (pip install 'minioscar[ray]')")
from .cluster import Replay, measured, passed  # noqa: E402

LOAD = Replay(agents=4, turns=4, system=384, task=128, new=16, result=64, lasting=700)


def test_two_replicas_hit_stream_free_their_rows_and_come_back(tmp_path):
    folder = write_talker(tmp_path / "tiny", 3, num_hidden_layers=1, max_position_embeddings=8192)
    report = measured(str(folder), LOAD, vocab=250, seed=1)
    assert report["hits_of_single"] >= 0.8, report
    assert report["cluster"]["left_s"] < 10
    assert report["killed"]["ended"].keys() == {"whole", "error"}, report
    assert report["killed"]["later_ended"].keys() == {"whole"} and passed(report), report
