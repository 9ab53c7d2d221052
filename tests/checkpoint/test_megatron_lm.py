"""A checkpoint as Megatron-LM's training leaves it: padded vocabulary, distributed optimizer, its arguments pickled."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.transformer.enums import AttnBackend

from megatron_r1.checkpoint import store  # noqa: F401  (megatron-core then saves without further processes)
from megatron_r1.checkpoint.torch_dist import EMBEDDING, TorchDistReader
from megatron_r1.config.convert import ExportConfig
from megatron_r1.convert.verbs import run_export
from megatron_r1.errors import DataError
from megatron_r1.model.mapping import weights
from megatron_r1.model.sharding import Piece
from megatron_r1.train.policy import Policy
from tests.checkpoint.conftest import MODEL, MakePolicy, train
from tests.checkpoint.test_torch_dist import written
from tests.convert.invented import tensors

VOCABULARY, PADDED = 400, 512


@pytest.fixture
def policy(make_policy: MakePolicy) -> Policy:
    """A model whose vocabulary has been rounded up to a multiple of 128."""
    policy = make_policy(vocab_size=PADDED, num_hidden_layers=2, torch_dtype="float32")
    train(policy, 0, 1)
    return policy


def save(policy: Policy, folder: Path, sharding: str) -> None:
    """With the keys of Megatron-LM's `generate_state_dict` (training/checkpointing.py)."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"distrib_optim_sharding_type": sharding, "dp_cp_group": group}
    model = policy.model.module.sharded_state_dict(prefix="", metadata=metadata)
    state = {
        "args": argparse.Namespace(
            padded_vocab_size=PADDED, params_dtype=torch.bfloat16, attention_backend=AttnBackend.flash, function=print
        ),
        "checkpoint_version": 3.0,
        "iteration": 10,
        "model": model,
        "optimizer": policy.trainable.optimizer.sharded_state_dict(model, metadata=metadata),
        "opt_param_scheduler": policy.trainable.scheduler.state_dict(),
    }
    (folder / "iter_0000010").mkdir(parents=True)
    dist_checkpointing.save(state, str(folder / "iter_0000010"))
    (folder / "latest_checkpointed_iteration.txt").write_text("10")


def described(folder: Path, rows: int) -> Path:
    """A folder with the `config.json` of so large a vocabulary."""
    config = json.loads((MODEL / "config.json").read_text())
    changes = {"vocab_size": rows, "num_hidden_layers": 2, "torch_dtype": "float32"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("sharding", ["dp_reshardable", "fully_reshardable"])
def test_the_true_rows_are_exported(
    policy: Policy, sharding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(policy, tmp_path / "saved", sharding)
    true, padded = (described(tmp_path / str(rows), rows) for rows in (VOCABULARY, PADDED))
    run_export(ExportConfig(source=tmp_path / "saved", output=tmp_path / "out", config=true))
    assert "leaves out the last 112 rows of its vocabulary" in capsys.readouterr().out
    ours, exported = weights(policy.model.module), tensors(tmp_path / "out")
    assert torch.equal(exported["model.embed_tokens.weight"], ours["embedding.word_embeddings.weight"][:VOCABULARY])
    assert torch.equal(exported["lm_head.weight"], ours["output_layer.weight"][:VOCABULARY])
    run_export(ExportConfig(source=tmp_path / "saved", output=tmp_path / "all", config=padded))
    assert "leaves out" not in capsys.readouterr().out
    assert torch.equal(tensors(tmp_path / "all")["lm_head.weight"], ours["output_layer.weight"])


def test_fewer_rows_than_the_vocabulary_has(policy: Policy, tmp_path: Path) -> None:
    save(policy, tmp_path / "saved", "dp_reshardable")
    config = ExportConfig(
        source=tmp_path / "saved", output=tmp_path / "out", config=described(tmp_path / "hf", PADDED + 1)
    )
    with pytest.raises(
        DataError, match=r"word_embeddings.weight has shape \[512, 64\], but config.json makes it \[513"
    ):
        run_export(config)
    assert not (tmp_path / "out").exists()


def test_padding_of_a_vocabulary_is_left_out(tmp_path: Path) -> None:
    """Megatron-LM rounds up to a multiple of 128 x its tensor parallel size; rows that it did not add are not lost."""
    whole = torch.randn(1024, 6)
    halves = [Piece(EMBEDDING, (1024, 6), (at, 0), (512, 6)) for at in (0, 512)]
    reader = TorchDistReader(written(tmp_path / "saved", *halves, whole=whole))

    def rows(count: int, key: str = EMBEDDING, width: int = 6) -> Piece:
        return Piece(key, (count, width), (0, 0), (count, width))

    for count in (897, 900, 1023, 513, 1):
        assert torch.equal(reader.read(rows(count)), whole[:count])
        assert reader.stored_bytes(rows(count)) == count * 24
    for other in (rows(1025), rows(900, width=5)):
        with pytest.raises(DataError, match=r"has shape \[1024, 6\], but config.json makes it .*; vocab_size must be"):
            reader.read(other)
    added = TorchDistReader(written(tmp_path / "added", rows(1000), whole=whole[:1000]))
    with pytest.raises(DataError, match=r"has shape \[1000, 6\], but config.json makes it \[992, 6\]; vocab_size"):
        added.read(rows(992))
