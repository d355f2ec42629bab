"""The heat map: a picture is written, and shows what the policy says."""

import numpy as np
import pytest

from afbs_compile.heatmap import densities, draw


def test_table_has_a_row_a_site_and_a_column_a_head(tuning):
    assert densities(tuning()).tolist() == [[0.2, 0.4], [1.0, 1.0]]


def test_unknown_and_missing_heads_are_not_numbers(tuning):
    base = tuning()
    site = base.sites["layers.0.attn"]
    short = type(site)("layers.2.attn", site.heads[:1], 1, 64, "causal", "sparse")
    table = densities(tuning(sites={site.name: site, short.name: short}))
    assert table[0].tolist() == [0.2, 0.4]
    assert table[1, 0] == 0.2
    assert np.isnan(table[1, 1])


def test_layers_come_in_their_order(tuning):
    site = tuning().sites["layers.0.attn"]
    names = [f"layers.{n}.attn" for n in (10, 9, 0)]
    sites = {
        name: type(site)(name, site.heads, 1, 64, "causal", decision)
        for name, decision in zip(names, ("dense", "sparse", "dense"), strict=True)
    }
    assert densities(tuning(sites=sites))[:, 0].tolist() == [1.0, 0.2, 1.0]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture_is_written(tuning, tmp_path, suffix):
    path = tmp_path / f"map.{suffix}"
    draw(tuning(), path, "a title")
    head = path.read_bytes()[:8]
    assert head == b"\x89PNG\r\n\x1a\n" if suffix == "png" else head.startswith(b"<?xml")


def test_nothing_to_draw(tuning, tmp_path):
    with pytest.raises(ValueError, match="no sites"):
        draw(tuning(sites={}), tmp_path / "map.png", "")
