"""Two gloo processes compute what one does: DDP, FSDP2, tensor and pipeline parallelism (equality.py measures)."""

import re

import pytest
import shared
from equality import measure
from helpers import TRANSFORMERS
from packaging.version import Version


pytestmark = pytest.mark.skipif(Version("5.23") > TRANSFORMERS, reason="docs/distributed.md: shards need 5.23")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return measure(tmp_path_factory.mktemp("equality"))


def test_ddp_gives_the_loss_curve_of_one_process(rows):
    assert rows["DDP: losses of 20 steps"].difference < 1e-5
    assert rows["DDP: weights after them"].difference < 1e-4
    assert rows["DDP: losses of 20 steps"].sharded == []


def test_fsdp2_gives_the_loss_curve_of_one_process(rows):
    """On a CPU other settings silently become DDP, hence the look at the parameters (before and after training)."""
    assert rows["FSDP2: losses of 20 steps"].difference < 1e-5
    assert rows["FSDP2: weights after them"].difference < 1e-4
    assert len(rows["FSDP2: losses of 20 steps"].sharded) == 60  # all


@pytest.mark.parametrize("saved", ["gathered", "consolidated"])
def test_a_sharded_save_loads_in_one_process_bit_for_bit(saved, rows):
    assert rows[f"FSDP2: saved {saved}, loaded by one process"].difference == 0


@pytest.mark.parametrize("variant", shared.TENSOR_PARALLEL)
def test_tensor_parallel(variant, rows):
    """Logits and accumulated gradients of both processes, those of unsplit simulations included."""
    for what in ("logits", "gradients"):
        row = rows[f"TP {variant}: {what}"]
        assert row.difference < 1e-12 * max(1.0, row.scale)
        split = {re.sub(r"model\.|layers\.\d\.|self_attn\.|mlp\.|\.weight|\.bias", "", name) for name in row.sharded}
        assert {"embed_tokens", "o_proj", "up_proj", "down_proj"} <= split
        assert split & {"q_proj", "q_b_proj", "q_head_proj"}
        assert all(name == "embed_tokens" or name.endswith(("_proj", "lm_head")) for name in split)


@pytest.mark.parametrize("variant", shared.GENERATE)
def test_tensor_parallel_generates_and_saves(variant, rows):
    assert rows[f"TP {variant}: generated ids"].difference == 0
    assert rows[f"TP {variant}: generated ids"].sharded
    assert rows[f"TP {variant}: saved, loaded by one process"].difference == 0


@pytest.mark.parametrize("variant", shared.PIPELINE)
def test_pipeline_parallel(variant, rows):
    assert rows[f"PP {variant}: logits"].difference < 1e-12
